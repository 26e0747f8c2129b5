// Which build of the kernels runs: the widest that the processor supports, or the one that ENTROPY_FAST_ISA names.
// The variable is read on every call. Naming a build that does not exist, or that the processor cannot run, throws
// std::runtime_error.
#pragma once

#include <string>
#include <vector>

#include "variants.h"

namespace entropy_fast {
namespace cpu {

std::vector<std::string> compiled_variants();
std::vector<std::string> supported_variants();
std::string selected_variant();
const Kernels& selected_kernels();

}  // namespace cpu
}  // namespace entropy_fast
