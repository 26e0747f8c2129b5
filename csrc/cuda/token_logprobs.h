#pragma once

#include "../token_logprobs.h"

namespace entropy_fast {
namespace cuda {

// Check the call's shape (std::invalid_argument) and enqueue it on `stream` (a cudaStream_t of the current device)
// without waiting for it. A launch that fails is a std::runtime_error. Targets out of range give NaN rows.
void token_logprobs_forward(const TokenLogprobsForward& call, void* stream);
void token_logprobs_backward(const TokenLogprobsBackward& call, void* stream);

// The number of devices, or -1 with the driver's reason: no driver, no device, a driver that is too old.
int device_count(const char** reason);

}  // namespace cuda
}  // namespace entropy_fast
