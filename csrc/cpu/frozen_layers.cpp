#include "frozen_layers.h"

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "parallel.h"

namespace entropy_fast {
namespace cpu {
namespace {

template <typename Call>
void run(const char* name, const Call& call, int threads, void (*kernel)(const Call&, int64_t, int64_t)) {
    if (call.rows < 0 || call.width < 0) throw std::invalid_argument(std::string(name) + ": negative size");
    if (call.element_type != ElementType::kFloat32 && call.element_type != ElementType::kFloat64) {
        throw std::invalid_argument(std::string(name) + ": neither float32 nor float64");
    }
    parallel_rows(call.rows, call.width, threads, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& call, int threads) {
    if (!(call.epsilon >= 0.0)) throw std::invalid_argument("rms_norm_forward: epsilon is negative or NaN");
    run("rms_norm_forward", call, threads, selected_kernels().rms_norm_forward);
}

void rms_norm_backward(const RmsNormBackward& call, int threads) {
    run("rms_norm_backward", call, threads, selected_kernels().rms_norm_backward);
}

void gated_silu_forward(const GatedSiluForward& call, int threads) {
    run("gated_silu_forward", call, threads, selected_kernels().gated_silu_forward);
}

void gated_silu_backward(const GatedSiluBackward& call, int threads) {
    run("gated_silu_backward", call, threads, selected_kernels().gated_silu_backward);
}

}  // namespace cpu
}  // namespace entropy_fast
