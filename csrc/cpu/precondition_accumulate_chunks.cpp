// The chunk loops of precondition_accumulate. Compiled once per instruction set, with ENTROPY_FAST_VARIANT naming the
// build.
#include <stdint.h>

#include "simd.h"
#include "variants.h"

namespace {

using entropy_fast::AccumulateEntry;
using entropy_fast::AccumulateFactors;
using entropy_fast::AccumulateKind;
using entropy_fast::kAccumulateChunk;
using entropy_fast::PreconditionAccumulate;

// Sums of products in double. Lane l of a float vector always goes to the same lane of the same half.
struct Dot {
    f64v low = {};
    f64v high = {};

    void add(f32v a, f32v b) {
        f64v a_low, a_high, b_low, b_high;
        widen(a, &a_low, &a_high);
        widen(b, &b_low, &b_high);
        low += a_low * b_low;
        high += a_high * b_high;
    }
    void add(f64v a, f64v b) { low += a * b; }
    double total() const { return sum_of_lanes(low + high); }
};

template <typename Vector, typename Scalar>
inline Vector preconditioned(Vector g, Vector v, Scalar bias_correction, Scalar eps, Scalar ratio) {
    const Vector root = square_root(v * bias_correction);
    const Vector scale = ratio / (root + eps);
    // A scale of 0, not a y of 0: a gradient that is not finite stays visible.
    return g * (root == (Scalar)0 ? Vector{} : scale);
}

// With roots and divisions in between, the processor alone does not keep enough reads under way: a sixth of the time.
template <typename Storage>
inline void fetch_ahead(const Storage* from) {
    constexpr int64_t kBytes = 2048;
    __builtin_prefetch(from + kBytes / (int64_t)sizeof(Storage));
}

// Gradient and Moment say how x and g, and v, are stored; Sum is the type of the sums and of everything computed.
template <typename Gradient, typename Moment, typename Sum>
void chunk(const PreconditionAccumulate& call, const AccumulateEntry& entry, const AccumulateFactors& factors,
           int64_t begin, int64_t end, double* dots) {
    using Scalar = typename Sum::Scalar;
    using Vector = typename Sum::Vector;
    constexpr int64_t kLanes = lanes<Sum>();
    const auto* x_from = reinterpret_cast<const typename Gradient::Storage*>(entry.x);
    const auto* g_from = reinterpret_cast<const typename Gradient::Storage*>(entry.g);
    const auto* v_from = reinterpret_cast<const typename Moment::Storage*>(entry.v);
    auto* x_sum = reinterpret_cast<typename Sum::Storage*>(entry.x_sum);
    auto* y_sum = reinterpret_cast<typename Sum::Storage*>(entry.y_sum);
    const Scalar x_scale = (Scalar)call.x_scale;
    const Scalar ratio = (Scalar)(factors.ratio * call.g_scale);
    const Scalar bias_correction = (Scalar)factors.bias_correction;
    const Scalar eps = (Scalar)factors.eps;
    Dot x_y, x_sum_y, y_sum_x;
    const auto step = [&](Vector x, Vector g, Vector v, Vector before_x, Vector before_y, Vector* after_x,
                          Vector* after_y) {
        x *= x_scale;
        const Vector y = v_from ? preconditioned(g, v, bias_correction, eps, ratio) : Vector{};
        x_y.add(x, y);
        x_sum_y.add(x, before_y);
        y_sum_x.add(y, before_x);
        *after_x = before_x + x;
        *after_y = before_y + y;
    };
    Vector after_x, after_y;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
        fetch_ahead(x_from + i);
        fetch_ahead(g_from + i);
        fetch_ahead(v_from + i);
        fetch_ahead(x_sum + i);
        fetch_ahead(y_sum + i);
        step(Gradient::load(x_from + i), Gradient::load(g_from + i), v_from ? Moment::load(v_from + i) : Vector{},
             Sum::load(x_sum + i), Sum::load(y_sum + i), &after_x, &after_y);
        if (call.update) {
            Sum::store(x_sum + i, after_x);
            Sum::store(y_sum + i, after_y);
        }
    }
    if (i < end) {
        const int64_t count = end - i;
        step(load_partial<Gradient>(x_from + i, count, 0), load_partial<Gradient>(g_from + i, count, 0),
             v_from ? load_partial<Moment>(v_from + i, count, 0) : Vector{}, load_partial<Sum>(x_sum + i, count, 0),
             load_partial<Sum>(y_sum + i, count, 0), &after_x, &after_y);
        if (call.update) {
            store_tail<Sum>(x_sum + i, after_x, count);
            store_tail<Sum>(y_sum + i, after_y, count);
        }
    }
    dots[0] = x_y.total();
    dots[1] = x_sum_y.total();
    dots[2] = y_sum_x.total();
}

}  // namespace

namespace entropy_fast {
namespace cpu {
namespace ENTROPY_FAST_VARIANT {

void precondition_accumulate(const PreconditionAccumulate& call, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
        const AccumulateEntry& entry = call.entries[call.owners[index]];
        const AccumulateFactors& factors = call.factors[call.owners[index]];
        const int64_t first = (index - entry.first_chunk) * kAccumulateChunk;
        const int64_t last = first + kAccumulateChunk < entry.numel ? first + kAccumulateChunk : entry.numel;
        double* dots = call.partial_dots + 3 * index;
        switch (entry.kind) {
            case AccumulateKind::kFloat32:
                chunk<Float32, Float32, Float32>(call, entry, factors, first, last, dots);
                break;
            case AccumulateKind::kBFloat16:
                chunk<BFloat16, Float32, Float32>(call, entry, factors, first, last, dots);
                break;
            case AccumulateKind::kFloat16:
                chunk<Float16, Float32, Float32>(call, entry, factors, first, last, dots);
                break;
            case AccumulateKind::kBFloat16Moments:
                chunk<BFloat16, BFloat16, Float32>(call, entry, factors, first, last, dots);
                break;
            case AccumulateKind::kFloat64:
                chunk<Float64, Float64, Float64>(call, entry, factors, first, last, dots);
                break;
        }
    }
}

}  // namespace ENTROPY_FAST_VARIANT
}  // namespace cpu
}  // namespace entropy_fast
