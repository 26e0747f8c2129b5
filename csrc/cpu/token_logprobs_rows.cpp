// The row loops of token_logprobs. Compiled once per instruction set, with ENTROPY_FAST_VARIANT naming the build.
#include <stdint.h>

#include "simd.h"
#include "variants.h"

namespace {

using entropy_fast::ElementType;
using entropy_fast::TokenLogprobsBackward;
using entropy_fast::TokenLogprobsForward;

// A chunk is read twice, for its maximum and for its sum, while it is in the first-level cache; memory is read once.
constexpr int64_t kChunk = 1024;
constexpr int kAccumulators = 4;

template <typename Element>
constexpr int64_t lanes() {
    return sizeof(typename Element::Vector) / sizeof(typename Element::Scalar);
}

// The last, partial vector of a row, filled up with -inf: it changes neither a maximum nor a sum of exponentials.
template <typename Element>
typename Element::Vector load_tail(const typename Element::Storage* from, int64_t count) {
    typename Element::Storage padded[lanes<Element>()];
    for (int64_t i = 0; i < lanes<Element>(); ++i) padded[i] = i < count ? from[i] : Element::kNegativeInfinity;
    return Element::load(padded);
}

template <typename Element>
typename Element::Scalar load_one(const typename Element::Storage* from) {
    return load_tail<Element>(from, 1)[0];
}

template <typename Element>
typename Element::Scalar chunk_maximum(const typename Element::Storage* x, int64_t count) {
    using Vector = typename Element::Vector;
    constexpr int64_t kLanes = lanes<Element>();
    const Vector lowest = Vector{} - (typename Element::Scalar)__builtin_inf();
    Vector highest[kAccumulators] = {lowest, lowest, lowest, lowest};
    int64_t i = 0;
    for (; i + kAccumulators * kLanes <= count; i += kAccumulators * kLanes) {
        for (int k = 0; k < kAccumulators; ++k) highest[k] = maximum(Element::load(x + i + k * kLanes), highest[k]);
    }
    for (; i + kLanes <= count; i += kLanes) highest[0] = maximum(Element::load(x + i), highest[0]);
    if (i < count) highest[1] = maximum(load_tail<Element>(x + i, count - i), highest[1]);
    const Vector all = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
    typename Element::Scalar result = all[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) result = all[lane] > result ? all[lane] : result;
    return result;
}

// sum exp(x - shift); every x must be <= shift, or NaN, which the sum then is too.
template <typename Element>
double chunk_sum(const typename Element::Storage* x, int64_t count, typename Element::Scalar shift) {
    using Vector = typename Element::Vector;
    constexpr int64_t kLanes = lanes<Element>();
    Vector sum[kAccumulators] = {};
    int64_t i = 0;
    for (; i + kAccumulators * kLanes <= count; i += kAccumulators * kLanes) {
        for (int k = 0; k < kAccumulators; ++k) sum[k] += exp_nonpositive(Element::load(x + i + k * kLanes) - shift);
    }
    for (; i + kLanes <= count; i += kLanes) sum[0] += exp_nonpositive(Element::load(x + i) - shift);
    if (i < count) sum[1] += exp_nonpositive(load_tail<Element>(x + i, count - i) - shift);
    const Vector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    double result = 0.0;
    for (int64_t lane = 0; lane < kLanes; ++lane) result += all[lane];
    return result;
}

template <typename Element>
bool has_nan(const typename Element::Storage* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const typename Element::Scalar value = load_one<Element>(x + i);
        if (value != value) return true;
    }
    return false;
}

template <typename Element>
void forward_row(const typename Element::Storage* x, int64_t vocabulary, int64_t target,
                 typename Element::Scalar* logprob, double* lse) {
    using Scalar = typename Element::Scalar;
    const double infinity = __builtin_inf();
    const double nan = __builtin_nan("");
    Scalar highest = -(Scalar)infinity;
    double sum = 0.0;
    for (int64_t begin = 0; begin < vocabulary; begin += kChunk) {
        const int64_t count = vocabulary - begin < kChunk ? vocabulary - begin : kChunk;
        const Scalar chunk_highest = chunk_maximum<Element>(x + begin, count);
        if (chunk_highest > highest) {
            // With no finite value so far the sum is 0, or NaN, and stays what it is.
            if (sum > 0.0) sum *= __builtin_exp((double)highest - (double)chunk_highest);
            highest = chunk_highest;
        }
        if (highest == (Scalar)infinity) break;
        // While everything was -inf (or NaN), -inf - -inf would make a NaN of what is a 0.
        sum += chunk_sum<Element>(x + begin, count, highest == -(Scalar)infinity ? (Scalar)0 : highest);
    }
    if (highest == (Scalar)infinity) {
        *lse = has_nan<Element>(x, vocabulary) ? nan : infinity;
        *logprob = (Scalar)nan;
    } else if (highest == -(Scalar)infinity) {
        *lse = sum == sum ? -infinity : nan;
        *logprob = (Scalar)nan;
    } else {
        const double log_sum = __builtin_log(sum);
        *lse = (double)highest + log_sum;
        *logprob = (Scalar)(((double)load_one<Element>(x + target) - (double)highest) - log_sum);
    }
}

template <typename Element>
void forward_rows(const TokenLogprobsForward& call, int64_t begin, int64_t end) {
    const auto* logits = static_cast<const typename Element::Storage*>(call.logits);
    auto* logprob = static_cast<typename Element::Scalar*>(call.logprob);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t target = call.targets[row];
        if (target == call.ignore_index) {
            logprob[row] = 0;
            call.lse[row] = 0.0;
        } else {
            forward_row<Element>(logits + row * call.row_stride, call.vocabulary, target, logprob + row,
                                 call.lse + row);
        }
    }
}

template <typename Element>
void store_tail(typename Element::Storage* to, typename Element::Vector value, int64_t count) {
    typename Element::Storage padded[lanes<Element>()];
    Element::store(padded, value);
    for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

template <typename Element>
void backward_row(const typename Element::Storage* x, int64_t vocabulary, int64_t target, double lse,
                  double grad_logprob, double grad_lse, typename Element::Storage* grad) {
    using Scalar = typename Element::Scalar;
    using Vector = typename Element::Vector;
    constexpr int64_t kLanes = lanes<Element>();
    // x - lse in two steps, so that a float loses nothing of a double lse. Where lse is not finite, `low` is NaN.
    const Scalar high = (Scalar)lse;
    const Scalar low = (Scalar)(lse - (double)high);
    const Scalar scale = (Scalar)(grad_lse - grad_logprob);
    // Rounding can leave x_v a little above lse (a row of one token): the exponential is asked for no more than 0.
    const Vector zero = {};
    const auto gradient = [&](Vector values) {
        const Vector difference = (values - high) - low;
        return scale * exp_nonpositive(difference > zero ? zero : difference);
    };
    int64_t i = 0;
    for (; i + kLanes <= vocabulary; i += kLanes) Element::store(grad + i, gradient(Element::load(x + i)));
    if (i < vocabulary)
        store_tail<Element>(grad + i, gradient(load_tail<Element>(x + i, vocabulary - i)), vocabulary - i);
    // 1 - p of a likely token would cancel.
    const double logprob = ((double)load_one<Element>(x + target) - (double)high) - (double)low;
    const double at_target = grad_lse * __builtin_exp(logprob) - grad_logprob * __builtin_expm1(logprob);
    store_tail<Element>(grad + target, zero + (Scalar)at_target, 1);
}

template <typename Element>
void backward_rows(const TokenLogprobsBackward& call, int64_t begin, int64_t end) {
    using Storage = typename Element::Storage;
    const auto* logits = static_cast<const Storage*>(call.logits);
    const auto* grad_logprob = static_cast<const typename Element::Scalar*>(call.grad_logprob);
    auto* grad_logits = static_cast<Storage*>(call.grad_logits);
    for (int64_t row = begin; row < end; ++row) {
        Storage* grad = grad_logits + row * call.vocabulary;
        const int64_t target = call.targets[row];
        if (target == call.ignore_index) {
            __builtin_memset(grad, 0, sizeof(Storage) * call.vocabulary);
        } else {
            backward_row<Element>(logits + row * call.row_stride, call.vocabulary, target, call.lse[row],
                                  grad_logprob[row], call.grad_lse[row], grad);
        }
    }
}

void token_logprobs_forward(const TokenLogprobsForward& call, int64_t begin, int64_t end) {
    switch (call.element_type) {
        case ElementType::kFloat32:
            return forward_rows<Float32>(call, begin, end);
        case ElementType::kFloat64:
            return forward_rows<Float64>(call, begin, end);
        case ElementType::kBFloat16:
            return forward_rows<BFloat16>(call, begin, end);
        case ElementType::kFloat16:
            return forward_rows<Float16>(call, begin, end);
    }
}

void token_logprobs_backward(const TokenLogprobsBackward& call, int64_t begin, int64_t end) {
    switch (call.element_type) {
        case ElementType::kFloat32:
            return backward_rows<Float32>(call, begin, end);
        case ElementType::kFloat64:
            return backward_rows<Float64>(call, begin, end);
        case ElementType::kBFloat16:
            return backward_rows<BFloat16>(call, begin, end);
        case ElementType::kFloat16:
            return backward_rows<Float16>(call, begin, end);
    }
}

}  // namespace

namespace entropy_fast {
namespace cpu {
namespace ENTROPY_FAST_VARIANT {

const Kernels kernels = {token_logprobs_forward, token_logprobs_backward};

}  // namespace ENTROPY_FAST_VARIANT
}  // namespace cpu
}  // namespace entropy_fast
