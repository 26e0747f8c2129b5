#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace entropy_fast {
namespace cpu {
namespace {

struct Variant {
    const char* name;
    const Kernels* kernels;
    bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// From the widest to the one that every processor of the architecture runs.
const Variant kVariants[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::kernels, has_avx512},
    {"avx2", &avx2::kernels, has_avx2},
#endif
    {"baseline", &baseline::kernels, always},
};

std::string quoted_names(const std::vector<std::string>& names) {
    std::string joined;
    for (const std::string& name : names) joined += (joined.empty() ? "" : ", ") + name;
    return joined;
}

const Variant& select() {
    const char* requested = std::getenv("ENTROPY_FAST_ISA");
    if (requested == nullptr || *requested == '\0') {
        for (const Variant& variant : kVariants) {
            if (variant.supported()) return variant;
        }
    }
    for (const Variant& variant : kVariants) {
        if (requested != nullptr && std::string(requested) == variant.name) {
            if (variant.supported()) return variant;
            throw std::runtime_error("ENTROPY_FAST_ISA=" + std::string(requested) +
                                     ", which this processor cannot run; it can run " +
                                     quoted_names(supported_variants()));
        }
    }
    throw std::runtime_error("ENTROPY_FAST_ISA=" + std::string(requested) +
                             " names no build of the kernels; there are " + quoted_names(compiled_variants()));
}

}  // namespace

std::vector<std::string> compiled_variants() {
    std::vector<std::string> names;
    for (const Variant& variant : kVariants) names.emplace_back(variant.name);
    return names;
}

std::vector<std::string> supported_variants() {
    std::vector<std::string> names;
    for (const Variant& variant : kVariants) {
        if (variant.supported()) names.emplace_back(variant.name);
    }
    return names;
}

std::string selected_variant() { return select().name; }

const Kernels& selected_kernels() { return *select().kernels; }

}  // namespace cpu
}  // namespace entropy_fast
