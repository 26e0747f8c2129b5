// The rows of csrc/frozen_layers.h, compiled once per instruction set.
#include "simd.h"
#include "variants.h"

namespace {

using entropy_fast::ElementType;

inline double root(double x) { return __builtin_sqrt(x); }

// Calls step(i, count) for every vector of a row, the last one of which may be partial.
template <typename Element, typename Step>
inline void along(int64_t width, const Step& step) {
    constexpr int64_t kLanes = lanes<Element>();
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) step(i, kLanes);
    if (i < width) step(i, width - i);
}

template <typename Element>
inline typename Element::Vector load_some(const typename Element::Storage* from, int64_t count) {
    return count == lanes<Element>() ? Element::load(from) : load_partial<Element>(from, count, 0);
}

template <typename Element>
inline void store_some(typename Element::Storage* to, typename Element::Vector value, int64_t count) {
    if (count == lanes<Element>()) return Element::store(to, value);
    store_tail<Element>(to, value, count);
}

template <typename Element>
void normalize(const entropy_fast::RmsNormForward& call, int64_t begin, int64_t end) {
    using Scalar = typename Element::Scalar;
    using Vector = typename Element::Vector;
    const auto* weight = static_cast<const Scalar*>(call.weight);
    for (int64_t row = begin; row < end; ++row) {
        const auto* x = static_cast<const Scalar*>(call.x) + row * call.width;
        auto* y = static_cast<Scalar*>(call.y) + row * call.width;
        Vector squares = {};
        along<Element>(call.width, [&](int64_t i, int64_t count) {
            const Vector own = load_some<Element>(x + i, count);
            squares += own * own;
        });
        const double mean = sum_of_lanes(squares) / static_cast<double>(call.width);
        const auto scale = static_cast<Scalar>(1.0 / root(mean + call.epsilon));
        static_cast<Scalar*>(call.scales)[row] = scale;
        along<Element>(call.width, [&](int64_t i, int64_t count) {
            const Vector own = load_some<Element>(x + i, count) * scale;
            store_some<Element>(y + i, load_some<Element>(weight + i, count) * own, count);
        });
    }
}

template <typename Element>
void normalize_backward(const entropy_fast::RmsNormBackward& call, int64_t begin, int64_t end) {
    using Scalar = typename Element::Scalar;
    using Vector = typename Element::Vector;
    const auto* weight = static_cast<const Scalar*>(call.weight);
    for (int64_t row = begin; row < end; ++row) {
        const auto* x = static_cast<const Scalar*>(call.x) + row * call.width;
        const auto* dy = static_cast<const Scalar*>(call.dy) + row * call.width;
        auto* dx = static_cast<Scalar*>(call.dx) + row * call.width;
        const Scalar scale = static_cast<const Scalar*>(call.scales)[row];
        Vector products = {};
        along<Element>(call.width, [&](int64_t i, int64_t count) {
            products += load_some<Element>(weight + i, count) * load_some<Element>(dy + i, count) *
                        load_some<Element>(x + i, count);
        });
        const double wide = scale;
        const auto along_x =
            static_cast<Scalar>(sum_of_lanes(products) * wide * wide * wide / static_cast<double>(call.width));
        along<Element>(call.width, [&](int64_t i, int64_t count) {
            const Vector own = load_some<Element>(weight + i, count) * load_some<Element>(dy + i, count) * scale;
            store_some<Element>(dx + i, own - load_some<Element>(x + i, count) * along_x, count);
        });
    }
}

// 1 / (1 + exp(-z)), by the exponential of a number that is not positive.
template <typename Vector>
inline Vector sigmoid(Vector z) {
    const Vector e = exp_nonpositive(z < 0 ? z : -z);
    return (z < 0 ? e : Vector{} + 1) / (e + 1);
}

template <typename Element>
void gate(const entropy_fast::GatedSiluForward& call, int64_t begin, int64_t end) {
    using Scalar = typename Element::Scalar;
    const auto* gate = static_cast<const Scalar*>(call.gate) + begin * call.width;
    const auto* up = static_cast<const Scalar*>(call.up) + begin * call.width;
    auto* y = static_cast<Scalar*>(call.y) + begin * call.width;
    along<Element>((end - begin) * call.width, [&](int64_t i, int64_t count) {
        const auto z = load_some<Element>(gate + i, count);
        store_some<Element>(y + i, z * sigmoid(z) * load_some<Element>(up + i, count), count);
    });
}

template <typename Element>
void gate_backward(const entropy_fast::GatedSiluBackward& call, int64_t begin, int64_t end) {
    using Scalar = typename Element::Scalar;
    const auto* dy = static_cast<const Scalar*>(call.dy) + begin * call.width;
    const auto* gate = static_cast<const Scalar*>(call.gate) + begin * call.width;
    const auto* up = static_cast<const Scalar*>(call.up) + begin * call.width;
    auto* dgate = static_cast<Scalar*>(call.dgate) + begin * call.width;
    auto* dup = static_cast<Scalar*>(call.dup) + begin * call.width;
    along<Element>((end - begin) * call.width, [&](int64_t i, int64_t count) {
        const auto z = load_some<Element>(gate + i, count);
        const auto above = load_some<Element>(dy + i, count);
        const auto s = sigmoid(z);
        store_some<Element>(dup + i, above * z * s, count);
        const auto slope = s * (1 + z * (1 - s));
        store_some<Element>(dgate + i, above * load_some<Element>(up + i, count) * slope, count);
    });
}

}  // namespace

namespace entropy_fast {
namespace cpu {
namespace ENTROPY_FAST_VARIANT {

// Other element types were refused by the host.
#define ENTROPY_FAST_BY_ELEMENT(function)                                                       \
    if (call.element_type == ElementType::kFloat32) return function<Float32>(call, begin, end); \
    return function<Float64>(call, begin, end)

void rms_norm_forward(const RmsNormForward& call, int64_t begin, int64_t end) { ENTROPY_FAST_BY_ELEMENT(normalize); }

void rms_norm_backward(const RmsNormBackward& call, int64_t begin, int64_t end) {
    ENTROPY_FAST_BY_ELEMENT(normalize_backward);
}

void gated_silu_forward(const GatedSiluForward& call, int64_t begin, int64_t end) { ENTROPY_FAST_BY_ELEMENT(gate); }

void gated_silu_backward(const GatedSiluBackward& call, int64_t begin, int64_t end) {
    ENTROPY_FAST_BY_ELEMENT(gate_backward);
}

#undef ENTROPY_FAST_BY_ELEMENT

}  // namespace ENTROPY_FAST_VARIANT
}  // namespace cpu
}  // namespace entropy_fast
