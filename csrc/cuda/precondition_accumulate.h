#pragma once

#include "../precondition_accumulate.h"

namespace entropy_fast {
namespace cuda {

// Check the call's sizes (std::invalid_argument) and enqueue it on `stream` (a cudaStream_t of the current device)
// without waiting for it, which a CUDA graph can record. A launch that fails is a std::runtime_error. The table is in
// the device's memory, and trusted.
void precondition_accumulate(const PreconditionAccumulate& call, void* stream);

}  // namespace cuda
}  // namespace entropy_fast
