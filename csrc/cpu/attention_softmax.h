// The softmax of a block's scores, down the columns, and its derivative.
//
// Included only by sources that are compiled once per instruction set.
#pragma once

#include "attention_blocks.h"

namespace {

// The score of its sink for each column, -inf where there are none.
template <typename Scalar>
void load_sinks(const PackedAttention& inputs, const SequenceHead& head, const QueryBlock& block, Scalar* to) {
    for (int64_t column = 0; column < block.stride; ++column) to[column] = negative_infinity<Scalar>();
    if (inputs.sinks == nullptr) return;
    const auto* from = static_cast<const Scalar*>(inputs.sinks) + head.key_head * block.shared;
    for_each_column(block, [&](int64_t column, int64_t, int64_t of_shared) { to[column] = from[of_shared]; });
}

// z to exp(z - highest) for the highest of each column, which this block may raise; `factors` are then what the sums
// so far have to be multiplied by.
template <typename Element>
void exponentials(const QueryBlock& block, int64_t keys, typename Element::Scalar* scores,
                  typename Element::Scalar* all_highest, typename Element::Scalar* sums,
                  typename Element::Scalar* factors) {
    using Vector = typename Element::Vector;
    const Vector lowest = Vector{} + negative_infinity<typename Element::Scalar>();
    for (int64_t column = 0; column < block.stride; column += lanes<Element>()) {
        auto* const from = scores + column;
        const Vector before = Element::load(all_highest + column);
        // Several of them, for one comparison has to wait for the one before.
        Vector highest[4] = {before, lowest, lowest, lowest};
        int64_t key = 0;
        for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                highest[k] = maximum(Element::load(from + (key + k) * block.stride), highest[k]);
            }
        }
        for (; key < keys; ++key) highest[0] = maximum(Element::load(from + key * block.stride), highest[0]);
        const Vector now = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
        // Where a query has seen no key yet, there is nothing to be subtracted.
        const Vector shift = now == lowest ? Vector{} : now;
        const Vector factor = exp_nonpositive(before - shift);
        Vector sum[2] = {Element::load(sums + column) * factor, Vector{}};
        for (key = 0; key + 2 <= keys; key += 2) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                auto* const at = from + (key + k) * block.stride;
                const Vector term = exp_nonpositive(Element::load(at) - shift);
                Element::store(at, term);
                sum[k] += term;
            }
        }
        if (key < keys) {
            auto* const at = from + key * block.stride;
            const Vector term = exp_nonpositive(Element::load(at) - shift);
            Element::store(at, term);
            sum[0] += term;
        }
        Element::store(all_highest + column, now);
        Element::store(sums + column, sum[0] + sum[1]);
        Element::store(factors + column, factor);
    }
}

// In the backward, a block's scores stand in pairs of rows: z of a key, and beside it dp.
inline int64_t apart(const QueryBlock& block) { return 2 * block.stride; }

// The highest z of each column, which these keys may raise, and dp there.
template <typename Element>
void find_highest(const QueryBlock& block, int64_t keys, const typename Element::Scalar* scores,
                  typename Element::Scalar* all_highest, typename Element::Scalar* of_highest) {
    using Vector = typename Element::Vector;
    const Vector lowest = Vector{} + negative_infinity<typename Element::Scalar>();
    for (int64_t column = 0; column < block.stride; column += lanes<Element>()) {
        Vector highest[4] = {Element::load(all_highest + column), lowest, lowest, lowest};
        Vector there[4] = {Element::load(of_highest + column)};
        const auto look = [&](int64_t key, int place) {
            const auto* const at = scores + key * apart(block) + column;
            const Vector z = Element::load(at), dp = Element::load(at + block.stride);
            there[place] = z > highest[place] ? dp : there[place];
            highest[place] = maximum(z, highest[place]);
        };
        int64_t key = 0;
        for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) look(key + k, k);
        }
        for (; key < keys; ++key) look(key, 0);
#pragma GCC unroll 4
        for (int k = 1; k < 4; ++k) {
            there[0] = highest[k] > highest[0] ? there[k] : there[0];
            highest[0] = maximum(highest[k], highest[0]);
        }
        Element::store(all_highest + column, highest[0]);
        Element::store(of_highest + column, there[0]);
    }
}

// z to exp(z - highest), which is p times `sums`; and sum(p (dp - of_highest)). `sums` has the scores of sinks before.
template <typename Element>
void probabilities(const QueryBlock& block, int64_t keys, typename Element::Scalar* scores,
                   const typename Element::Scalar* highest, const typename Element::Scalar* of_highest,
                   typename Element::Scalar* sums, typename Element::Scalar* changes) {
    using Vector = typename Element::Vector;
    const Vector lowest = Vector{} + negative_infinity<typename Element::Scalar>();
    for (int64_t column = 0; column < block.stride; column += lanes<Element>()) {
        const Vector now = Element::load(highest + column), there = Element::load(of_highest + column);
        const Vector shift = now == lowest ? Vector{} : now;
        Vector sum = exp_nonpositive(Element::load(sums + column) - shift);
        Vector change = -there * sum;  // dp of a sink is 0
        for (int64_t first = 0; first < keys; first += kKeysOfBlock) {
            Vector of_sum[2] = {}, of_change[2] = {};
            const auto add = [&](int64_t key, int place) {
                auto* const at = scores + key * apart(block) + column;
                const Vector term = exp_nonpositive(Element::load(at) - shift);
                Element::store(at, term);
                of_sum[place] += term;
                of_change[place] += term * (Element::load(at + block.stride) - there);
            };
            const int64_t end = smaller(keys, first + kKeysOfBlock);
            int64_t key = first;
            for (; key + 2 <= end; key += 2) {
#pragma GCC unroll 2
                for (int k = 0; k < 2; ++k) add(key + k, k);
            }
            if (key < end) add(key, 0);
            sum += of_sum[0] + of_sum[1];
            change += of_change[0] + of_change[1];
        }
        Element::store(sums + column, sum);
        Element::store(changes + column, change / sum);
    }
}

// dp to dz, without the scale; times `sums`, like p.
template <typename Element>
void score_gradients(const QueryBlock& block, int64_t keys, const typename Element::Scalar* of_highest,
                     const typename Element::Scalar* changes, typename Element::Scalar* scores) {
    for (int64_t column = 0; column < block.stride; column += lanes<Element>()) {
        const auto there = Element::load(of_highest + column);
        const auto change = Element::load(changes + column);
        for (int64_t key = 0; key < keys; ++key) {
            auto* const at = scores + key * apart(block) + column;
            auto* const dp = at + block.stride;
            Element::store(dp, Element::load(at) * ((Element::load(dp) - there) - change));
        }
    }
}

}  // namespace
