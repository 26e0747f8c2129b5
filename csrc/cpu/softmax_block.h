#pragma once

#include "../softmax_block.h"

namespace entropy_fast {
namespace cpu {

// Check the call (std::invalid_argument) and run it on at most `threads` threads, with the same bits for any number.
void softmax_block(const SoftmaxBlock& call, int threads);
void sums_of_blocks(const SumsOfBlocks& call, int threads);

}  // namespace cpu
}  // namespace entropy_fast
