#pragma once

#include "../token_logprobs.h"

namespace entropy_fast {
namespace cpu {

// Check the call (std::invalid_argument) and run it on at most `threads` threads, with the same bits for any number.
void token_logprobs_forward(const TokenLogprobsForward& call, int threads);
void token_logprobs_backward(const TokenLogprobsBackward& call, int threads);

}  // namespace cpu
}  // namespace entropy_fast
