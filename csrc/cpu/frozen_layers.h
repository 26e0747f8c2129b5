#pragma once

#include "../frozen_layers.h"

namespace entropy_fast {
namespace cpu {

// Check the call (std::invalid_argument) and run it on at most `threads` threads, with the same bits for any number.
void rms_norm_forward(const RmsNormForward& call, int threads);
void rms_norm_backward(const RmsNormBackward& call, int threads);
void gated_silu_forward(const GatedSiluForward& call, int threads);
void gated_silu_backward(const GatedSiluBackward& call, int threads);

}  // namespace cpu
}  // namespace entropy_fast
