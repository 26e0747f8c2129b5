// The row loops of token_logprobs. Compiled once per instruction set, with ENTROPY_FAST_VARIANT naming the build.
#include <stdint.h>

#include "simd.h"
#include "variants.h"

namespace {

using entropy_fast::ElementType;
using entropy_fast::kRaiseThreshold;
using entropy_fast::TokenLogprobsBackward;
using entropy_fast::TokenLogprobsForward;

// Exponentials are taken relative to the highest logit of the chunks so far, and summed up while the next highest is
// looked for: a chunk that turns out to go more than kRaiseThreshold above is done again, from the first-level cache.
constexpr int64_t kChunk = 4096;
constexpr int kAccumulators = 4;
constexpr int kFold = 8;

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
    return highest_lane(maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3])));
}

// sum exp(x - m), sum exp(x - m) (x - m), and the highest x that is not NaN.
struct Sums {
    double plain;
    double weighted;
    double highest;
};

// A NaN makes the sums NaN; where some x is more than kRaiseThreshold above the shift they are of no use. A token of
// probability 0 counts as the smallest normal number: the largest term is about 1, so that is below any rounding.
template <bool kWeighted, typename Element>
Sums chunk_sums(const typename Element::Storage* x, int64_t count, typename Element::Scalar shift) {
    using Vector = typename Element::Vector;
    constexpr int64_t kLanes = lanes<Element>();
    // Sums of a few terms are added to sums of such sums: rounding grows with the number of additions to one of them.
    Vector sum[kAccumulators] = {};
    Vector weighted[kAccumulators] = {};
    Vector total = {};
    Vector total_weighted = {};
    Vector highest[kAccumulators];
    for (int k = 0; k < kAccumulators; ++k) highest[k] = Vector{} - (typename Element::Scalar)__builtin_inf();
    const auto add = [&](int k, Vector values) {
        highest[k] = maximum(values, highest[k]);
        const Vector difference = no_less_than_floor(values - shift);
        const Vector term = exp_term(difference);
        sum[k] += term;
        if (kWeighted) weighted[k] += term * difference;
    };
    const auto fold = [&] {
        total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
        if (kWeighted) total_weighted += (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
        for (int k = 0; k < kAccumulators; ++k) sum[k] = weighted[k] = Vector{};
    };
    // Each accumulator has a part of the chunk of its own, a page from the next one: four streams, and every one asks
    // for what it will read in the next chunk. One stream alone is read at two thirds of this speed, because the
    // processor looks no further ahead than the exponentials it is working on allow.
    const int64_t part = count / (kFold * kAccumulators * kLanes) * kFold * kLanes;
    for (int64_t j = 0; j < part;) {
        for (int step = 0; step < kFold; ++step, j += kLanes) {
            for (int k = 0; k < kAccumulators; ++k) {
                const auto* from = x + k * part + j;
                __builtin_prefetch(from + kChunk);
                add(k, Element::load(from));
            }
        }
        fold();
    }
    int64_t i = kAccumulators * part;
    for (int k = 0; i + kLanes <= count; i += kLanes, k = (k + 1) % kAccumulators) add(k, Element::load(x + i));
    if (i < count) add(kAccumulators - 1, load_tail<Element>(x + i, count - i));
    fold();
    const Vector all = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
    return {sum_of_lanes(total), kWeighted ? sum_of_lanes(total_weighted) : 0.0, (double)highest_lane(all)};
}

template <typename Element>
bool has_nan(const typename Element::Storage* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const typename Element::Scalar value = load_one<Element>(x + i);
        if (value != value) return true;
    }
    return false;
}

template <bool kEntropy, typename Element>
void forward_row(const typename Element::Storage* x, int64_t vocabulary, int64_t target,
                 typename Element::Scalar* logprob, double* lse, double* entropy) {
    using Scalar = typename Element::Scalar;
    const double infinity = __builtin_inf();
    const double nan = __builtin_nan("");
    double highest = -infinity;
    Sums total = {0.0, 0.0, 0.0};
    for (int64_t begin = 0; begin < vocabulary; begin += kChunk) {
        const int64_t count = vocabulary - begin < kChunk ? vocabulary - begin : kChunk;
        Sums sums = {0.0, 0.0, -infinity};
        if (highest == -infinity) {
            sums.highest = (double)chunk_maximum<Element>(x + begin, count);
        } else {
            sums = chunk_sums<kEntropy, Element>(x + begin, count, (Scalar)highest);
        }
        if (sums.highest == infinity) {
            highest = infinity;
            break;
        }
        if (highest == -infinity || sums.highest > highest + kRaiseThreshold) {
            if (highest > -infinity) {
                const double lowered = highest - sums.highest;
                const double factor = __builtin_exp(lowered);
                total.weighted = (total.weighted + lowered * total.plain) * factor;
                total.plain *= factor;
            }
            highest = sums.highest;
            // While everything was -inf (or NaN), -inf - -inf would make a NaN of what is a 0.
            sums = chunk_sums<kEntropy, Element>(x + begin, count, highest == -infinity ? (Scalar)0 : (Scalar)highest);
            if (highest == -infinity) sums.plain = sums.weighted = sums.plain == sums.plain ? 0.0 : nan;
        }
        total.plain += sums.plain;
        total.weighted += sums.weighted;
    }
    *logprob = (Scalar)nan;
    if (kEntropy) *entropy = nan;
    if (highest == infinity) {
        *lse = has_nan<Element>(x, vocabulary) ? nan : infinity;
    } else if (highest == -infinity) {
        *lse = total.plain == total.plain ? -infinity : nan;
    } else {
        const double log_sum = __builtin_log(total.plain);
        *lse = highest + log_sum;
        *logprob = (Scalar)(((double)load_one<Element>(x + target) - highest) - log_sum);
        if (kEntropy) *entropy = log_sum - total.weighted / total.plain;
    }
}

template <typename Element>
void forward_rows(const TokenLogprobsForward& call, int64_t begin, int64_t end) {
    const auto* logits = static_cast<const typename Element::Storage*>(call.logits);
    auto* logprob = static_cast<typename Element::Scalar*>(call.logprob);
    for (int64_t row = begin; row < end; ++row) {
        const auto* x = logits + row * call.row_stride;
        const int64_t target = call.targets[row];
        if (target == call.ignore_index) {
            logprob[row] = 0;
            call.lse[row] = 0.0;
            if (call.entropy) call.entropy[row] = 0.0;
        } else if (call.entropy) {
            forward_row<true, Element>(x, call.vocabulary, target, logprob + row, call.lse + row, call.entropy + row);
        } else {
            forward_row<false, Element>(x, call.vocabulary, target, logprob + row, call.lse + row, nullptr);
        }
    }
}

// What the gradient of one row is made of.
struct RowGradient {
    double of_logprob;
    double of_lse;
    double of_entropy;
    double lse;
    double entropy;
};

template <bool kEntropy, typename Element>
void backward_row(const typename Element::Storage* x, int64_t vocabulary, int64_t target, const RowGradient& row,
                  typename Element::Storage* grad) {
    using Scalar = typename Element::Scalar;
    using Vector = typename Element::Vector;
    constexpr int64_t kLanes = lanes<Element>();
    // x - lse in two steps, so that a float loses nothing of a double lse. Where lse is not finite, `low` is NaN.
    const Scalar high = (Scalar)row.lse;
    const Scalar low = (Scalar)(row.lse - (double)high);
    const Scalar scale = (Scalar)(row.of_lse - row.of_logprob);
    const Scalar of_entropy = (Scalar)row.of_entropy;
    const Scalar entropy = (Scalar)row.entropy;
    // Rounding can leave x_v a little above lse (a row of one token): the exponential is asked for no more than 0.
    const Vector zero = {};
    const auto gradient = [&](Vector values) {
        const Vector difference = (values - high) - low;
        const Vector capped = difference > zero ? zero : difference;
        const Vector p = exp_nonpositive(capped);
        if (!kEntropy) return scale * p;
        // p is 0 at the floor and below, where the difference itself may be -inf.
        return p * (scale - of_entropy * (no_less_than_floor(capped) + entropy));
    };
    // Read before anything is written: the gradient may take the logits' place.
    const double logprob = ((double)load_one<Element>(x + target) - (double)high) - (double)low;
    int64_t i = 0;
    for (; i + kLanes <= vocabulary; i += kLanes) Element::store(grad + i, gradient(Element::load(x + i)));
    if (i < vocabulary)
        store_tail<Element>(grad + i, gradient(load_tail<Element>(x + i, vocabulary - i)), vocabulary - i);
    // 1 - p of a likely token would cancel.
    const double p = __builtin_exp(logprob);
    double at_target = row.of_lse * p - row.of_logprob * __builtin_expm1(logprob);
    if (kEntropy && p > 0.0) at_target -= row.of_entropy * p * (logprob + row.entropy);
    store_one<Element>(grad + target, (Scalar)at_target);
}

template <typename Element>
void backward_rows(const TokenLogprobsBackward& call, int64_t begin, int64_t end) {
    using Storage = typename Element::Storage;
    const auto* logits = static_cast<const Storage*>(call.logits);
    const auto* grad_logprob = static_cast<const typename Element::Scalar*>(call.grad_logprob);
    auto* grad_logits = static_cast<Storage*>(call.grad_logits);
    for (int64_t row = begin; row < end; ++row) {
        const Storage* x = logits + row * call.row_stride;
        Storage* grad = grad_logits + row * call.grad_row_stride;
        const int64_t target = call.targets[row];
        if (target == call.ignore_index) {
            __builtin_memset(grad, 0, sizeof(Storage) * call.vocabulary);
        } else if (call.grad_entropy) {
            const RowGradient parts = {grad_logprob[row], call.grad_lse[row], call.grad_entropy[row], call.lse[row],
                                       call.entropy[row]};
            backward_row<true, Element>(x, call.vocabulary, target, parts, grad);
        } else {
            const RowGradient parts = {grad_logprob[row], call.grad_lse[row], 0.0, call.lse[row], 0.0};
            backward_row<false, Element>(x, call.vocabulary, target, parts, grad);
        }
    }
}

}  // namespace

namespace entropy_fast {
namespace cpu {
namespace ENTROPY_FAST_VARIANT {

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

}  // namespace ENTROPY_FAST_VARIANT
}  // namespace cpu
}  // namespace entropy_fast
