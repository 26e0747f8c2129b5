// The row loops of softmax_block. Compiled once per instruction set, with ENTROPY_FAST_VARIANT naming the build.
// A row of one block stays in the first-level cache between its passes: maximum, sums, weights.
#include <stdint.h>

#include "simd.h"
#include "variants.h"

namespace {

using entropy_fast::kRaiseThreshold;
using entropy_fast::SoftmaxBlock;
using entropy_fast::SoftmaxRow;
using entropy_fast::SumsOfBlocks;

constexpr int64_t kPrefetch = 1024;

template <typename Element>
struct Row {
    typename Element::Storage* logits;
    typename Element::Storage* entropy_weights;
    int64_t width;
    typename Element::Scalar inverse_softcap;
};

// Calls visit(column, count, z) for each vector of a row, a partial one filled up with -inf.
template <typename Element, typename Visit>
void for_each_vector(const Row<Element>& row, const Visit& visit) {
    constexpr int64_t kLanes = lanes<Element>();
    int64_t column = 0;
    for (; column + kLanes <= row.width; column += kLanes) visit(column, kLanes, Element::load(row.logits + column));
    if (column < row.width) {
        visit(column, row.width - column, load_tail<Element>(row.logits + column, row.width - column));
    }
}

template <typename Element>
void store(typename Element::Storage* to, typename Element::Vector value, int64_t count) {
    if (count == lanes<Element>()) {
        store_weight<Element>(to, value);
    } else {
        store_tail<Element>(to, value, count);
    }
}

template <typename Element>
void clear(typename Element::Storage* row, int64_t width) {
    __builtin_memset(row, 0, sizeof(typename Element::Storage) * width);
}

struct Highest {
    double value;
    bool nan;
};

template <typename Element>
Highest highest_of(const Row<Element>& row) {
    using Vector = typename Element::Vector;
    // Four of them, for one comparison has to wait for the one before.
    constexpr int64_t kLanes = lanes<Element>();
    const Vector lowest = Vector{} - (typename Element::Scalar)__builtin_inf();
    Vector highest[4] = {lowest, lowest, lowest, lowest};
    int64_t column = 0;
    for (; column + 4 * kLanes <= row.width; column += 4 * kLanes) {
        for (int k = 0; k < 4; ++k) {
            const auto* from = row.logits + column + k * kLanes;
            // The product may have been another processor's: the last part of this row, and the next row, are fetched
            // early.
            __builtin_prefetch(from + kPrefetch);
            highest[k] = maximum(Element::load(from), highest[k]);
        }
    }
    const Row<Element> remaining = {row.logits + column, nullptr, row.width - column, 0};
    for_each_vector(remaining, [&](int64_t, int64_t, Vector z) { highest[0] = maximum(z, highest[0]); });
    const Vector all = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
    Highest result = {(double)highest_lane(all), false};
    if (result.value == __builtin_inf()) {
        Vector total = {};
        for_each_vector(row, [&](int64_t, int64_t, Vector z) { total += z - z == z - z ? Vector{} : z; });
        // Only now that there is an infinity does it matter whether there is a NaN too.
        for (int64_t lane = 0; lane < lanes<Element>(); ++lane) result.nan |= total[lane] != total[lane];
    }
    return result;
}

// One pass: the terms' sums if kSums, and the weights if kWeights (those of the entropy too if kEntropy).
template <bool kSums, bool kWeights, bool kEntropy, bool kSoftcap, typename Element>
void pass(const Row<Element>& row, double highest, double center, double* sum, double* weighted) {
    using Scalar = typename Element::Scalar;
    using Vector = typename Element::Vector;
    const Scalar shift = highest == -__builtin_inf() ? (Scalar)0 : (Scalar)highest;
    // z - center from z - highest: both are near the size of what they are taken from.
    const Scalar to_center = (Scalar)(highest - center);
    Vector sums = {};
    Vector products = {};
    for_each_vector(row, [&](int64_t column, int64_t count, Vector z) {
        const Vector difference = no_less_than_floor(z - shift);
        const Vector term = exp_term(difference);
        if (kSums) {
            sums += term;
            products += term * difference;
        }
        if (kWeights) {
            Vector weight = term;
            if (kSoftcap) {
                // An infinite logit would make inf * 0 of a weight that is 0.
                const Vector ratio = no_less_than_floor(z) * row.inverse_softcap;
                weight = term * ((Scalar)1 - ratio * ratio);
            }
            store<Element>(row.logits + column, weight, count);
            if (kEntropy) store<Element>(row.entropy_weights + column, weight * (difference + to_center), count);
        }
    });
    if (kSums) {
        *sum = sum_of_lanes(sums);
        *weighted = sum_of_lanes(products);
    }
}

template <bool kSoftcap, typename Element>
void process_row(const Row<Element>& row, int64_t target, bool weights, SoftmaxRow* state) {
    const double infinity = __builtin_inf();
    const Highest block = highest_of(row);
    state->factor = 1.0;
    state->center_shift = 0.0;
    if (block.value > state->highest + kRaiseThreshold || (state->highest == -infinity && block.value > -infinity)) {
        if (state->highest > -infinity) {
            const double lowered = state->highest - block.value;
            state->factor = __builtin_exp(lowered);
            state->weighted = (state->weighted + lowered * state->sum) * state->factor;
            state->sum *= state->factor;
            state->rest *= state->factor;
        }
        state->highest = block.value;
    }
    // Without the target, its place taken by a token of probability 0.
    const bool here = target >= 0 && target < row.width;
    typename Element::Storage at_target = {};
    if (here) {
        at_target = row.logits[target];
        state->at_target = (double)load_one<Element>(row.logits + target);
        row.logits[target] = Element::kNegativeInfinity;
    }
    double sum = 0.0;
    double weighted = 0.0;
    if (weights && !row.entropy_weights) {
        pass<true, true, false, kSoftcap, Element>(row, state->highest, 0.0, &sum, &weighted);
    } else {
        pass<true, false, false, kSoftcap, Element>(row, state->highest, 0.0, &sum, &weighted);
    }
    if (state->highest == -infinity) {
        // Nothing but -inf so far: what was summed up is rounding, or NaN.
        sum = weighted = sum == sum ? 0.0 : sum;
    }
    state->rest += sum;
    state->sum += sum;
    state->weighted += weighted;
    if (here && state->at_target > -infinity) {
        const double difference = state->at_target - state->highest;
        const double term = __builtin_exp(difference);
        state->sum += term;
        state->weighted += term > 0.0 ? term * difference : term;
    } else if (here && state->at_target != state->at_target) {
        state->sum = state->at_target;
    }
    if (state->highest == infinity) state->sum = block.nan || state->sum != state->sum ? __builtin_nan("") : infinity;
    if (weights && row.entropy_weights) {
        const double center = state->sum > 0.0 ? state->highest + state->weighted / state->sum : 0.0;
        state->center_shift = state->center - center;
        state->center = center;
        pass<false, true, true, kSoftcap, Element>(row, state->highest, center, nullptr, nullptr);
    }
    if (weights && (!(state->sum < infinity) || state->highest == -infinity)) {
        // Not finite, or nothing but -inf so far. The caller knows such rows by their sum. Their weights are 0, for
        // some matrix products read past the end of a row and count on 0 times that being 0: a NaN would get into the
        // row before.
        clear<Element>(row.logits, row.width);
        if (row.entropy_weights) clear<Element>(row.entropy_weights, row.width);
    } else if (here && weights) {
        store_one<Element>(row.logits + target, 0);
        if (row.entropy_weights) store_one<Element>(row.entropy_weights + target, 0);
    } else if (here) {
        row.logits[target] = at_target;
    }
}

template <typename Element>
void process_rows(const SoftmaxBlock& call, int64_t begin, int64_t end) {
    using Storage = typename Element::Storage;
    auto* logits = static_cast<Storage*>(call.logits);
    auto* entropy_weights = static_cast<Storage*>(call.entropy_weights);
    for (int64_t index = begin; index < end; ++index) {
        const int64_t offset = index * call.row_stride;
        const Row<Element> row = {logits + offset, entropy_weights ? entropy_weights + offset : nullptr, call.width,
                                  (typename Element::Scalar)(call.softcap > 0.0 ? 1.0 / call.softcap : 0.0)};
        const int64_t target = call.targets[index] - call.first_token;
        if (call.softcap > 0.0) {
            process_row<true>(row, target, call.weights, call.state + index);
        } else {
            process_row<false>(row, target, call.weights, call.state + index);
        }
    }
}

// One row of the sums: rescaled, and the block's product added.
template <typename Element, typename Sum>
void update_row(typename Sum::Scalar* sums, typename Sum::Scalar* entropy_sums,
                const typename Element::Storage* products, const typename Element::Storage* entropy_products,
                int64_t width, typename Sum::Scalar factor, typename Sum::Scalar center_shift) {
    using Vector = typename Sum::Vector;
    constexpr int64_t kLanes = lanes<Sum>();
    const auto step = [&](int64_t i, int64_t count) {
        const auto load_sums = [&](const typename Sum::Scalar* from) {
            return count == kLanes ? Sum::load(from + i) : load_partial<Sum>(from + i, count, 0);
        };
        const auto load_product = [&](const typename Element::Storage* from) {
            if (!from) return Vector{};
            return count == kLanes ? Element::load(from + i) : load_partial<Element>(from + i, count, 0);
        };
        const auto store_sums = [&](typename Sum::Scalar* to, Vector value) {
            if (count == kLanes) return Sum::store(to + i, value);
            store_tail<Sum>(to + i, value, count);
        };
        const Vector before = load_sums(sums);
        if (entropy_sums) {
            const Vector moved = (load_sums(entropy_sums) + center_shift * before) * factor;
            store_sums(entropy_sums, moved + load_product(entropy_products));
        }
        store_sums(sums, before * factor + load_product(products));
    };
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) step(i, kLanes);
    if (i < width) step(i, width - i);
}

template <typename Element, typename Sum>
void update_rows(const SumsOfBlocks& call, int64_t begin, int64_t end) {
    auto* sums = static_cast<typename Sum::Scalar*>(call.sums);
    auto* entropy_sums = static_cast<typename Sum::Scalar*>(call.entropy_sums);
    const auto* products = static_cast<const typename Element::Storage*>(call.products);
    const auto* entropy_products = static_cast<const typename Element::Storage*>(call.entropy_products);
    for (int64_t row = begin; row < end; ++row) {
        const SoftmaxRow& state = call.state[row];
        if (!products && state.factor == 1.0 && (state.center_shift == 0.0 || !entropy_sums)) continue;
        const int64_t offset = row * call.width;
        update_row<Element, Sum>(sums + offset, entropy_sums ? entropy_sums + offset : nullptr,
                                 products ? products + offset : nullptr,
                                 entropy_products ? entropy_products + offset : nullptr, call.width,
                                 (typename Sum::Scalar)state.factor, (typename Sum::Scalar)state.center_shift);
    }
}

}  // namespace

namespace entropy_fast {
namespace cpu {
namespace ENTROPY_FAST_VARIANT {

void softmax_block(const SoftmaxBlock& call, int64_t begin, int64_t end) {
    switch (call.element_type) {
        case ElementType::kFloat32:
            return process_rows<Float32>(call, begin, end);
        case ElementType::kFloat64:
            return process_rows<Float64>(call, begin, end);
        case ElementType::kBFloat16:
            return process_rows<BFloat16>(call, begin, end);
        case ElementType::kFloat16:
            return process_rows<Float16>(call, begin, end);
    }
}

void sums_of_blocks(const SumsOfBlocks& call, int64_t begin, int64_t end) {
    switch (call.element_type) {
        case ElementType::kFloat32:
            return update_rows<Float32, Float32>(call, begin, end);
        case ElementType::kFloat64:
            return update_rows<Float64, Float64>(call, begin, end);
        case ElementType::kBFloat16:
            return update_rows<BFloat16, Float32>(call, begin, end);
        case ElementType::kFloat16:
            return update_rows<Float16, Float32>(call, begin, end);
    }
}

}  // namespace ENTROPY_FAST_VARIANT
}  // namespace cpu
}  // namespace entropy_fast
