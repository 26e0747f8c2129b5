#pragma once

#include "../unit_products.h"

namespace entropy_fast {
namespace cpu {

// Checks the call (std::invalid_argument) and runs it on at most `threads` threads, with the same bits for any number.
void unit_products(const UnitProducts& call, int threads);

}  // namespace cpu
}  // namespace entropy_fast
