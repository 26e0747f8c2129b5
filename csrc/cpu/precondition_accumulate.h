#pragma once

#include "../precondition_accumulate.h"

namespace entropy_fast {
namespace cpu {

// Check the call (std::invalid_argument) and run it on at most `threads` threads, with the same bits for any number.
void precondition_accumulate(const PreconditionAccumulate& call, int threads);

}  // namespace cpu
}  // namespace entropy_fast
