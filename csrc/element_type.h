// The element types that logits may have. The numbers are part of the interface to Python.
#pragma once

#include <stdint.h>

namespace entropy_fast {

enum class ElementType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace entropy_fast
