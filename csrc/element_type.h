// The element types that logits may have, and how far they may go above a shift. The numbers are part of the interface
// to Python.
#pragma once

#include <stdint.h>

namespace entropy_fast {

enum class ElementType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// How far logits may go above what is subtracted before the exponential: e to this power fits into a half-precision
// float.
constexpr double kRaiseThreshold = 8.0;

}  // namespace entropy_fast
