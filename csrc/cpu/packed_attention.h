#pragma once

#include "../packed_attention.h"

namespace entropy_fast {
namespace cpu {

// Check the call (std::invalid_argument) and run it on at most `threads` threads, with the same bits for any number.
// Each thread takes a few hundred KiB of memory meanwhile, in the backward also the size of the longest prefix's keys
// and values of one head (csrc/cpu/attention_scratch.h).
void packed_attention_forward(const PackedAttentionForward& call, int threads);
void packed_attention_backward(const PackedAttentionBackward& call, int threads);

}  // namespace cpu
}  // namespace entropy_fast
