// Packed attention, a task at a time. Compiled once per instruction set, with ENTROPY_FAST_VARIANT naming the build.
#include <stdint.h>

#include "attention_blocks.h"
#include "variants.h"

namespace {

using entropy_fast::PackedAttentionBackward;
using entropy_fast::PackedAttentionForward;

// Where in [tokens, heads] a block begins.
int64_t row_of_output(const PackedAttention& inputs, const SequenceHead& head, const QueryBlock& block) {
    return (head.sequence->begin + block.first) * inputs.heads + head.key_head * block.shared;
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

template <typename Element>
void forward_block(const PackedAttentionForward& call, const SequenceHead& head, const QueryBlock& block,
                   const AttentionScratch& scratch, typename Element::Scalar* memory) {
    using Scalar = typename Element::Scalar;
    using Wide = typename Accumulator<Element>::Type;
    const PackedAttention& inputs = call.inputs;
    const int64_t width = scratch.width;
    auto* const queries = memory + scratch.transposed_queries;
    auto* const result = memory + scratch.result;
    auto* const scores = memory + scratch.scores;
    auto* const highest = memory + scratch.log_sums;
    auto* const sums = memory + scratch.sums;
    auto* const factors = memory + scratch.queries;  // whose rows the forward needs no more once they are transposed
    load_block<Element>(inputs.query, head, block, inputs.size, width, (Scalar)inputs.scale, memory + scratch.queries,
                        queries);
    for (int64_t column = 0; column < block.stride; ++column) {
        highest[column] = negative_infinity<Scalar>();
        sums[column] = 0;
    }
    bool first = true;
    for_each_key_block<Element>(inputs, head, block, scratch, memory, [&](const KeyBlock<Scalar>& keys) {
        products_with_keys<Element>(keys.keys, keys.key_row, keys.count, queries, block, inputs.size, scores);
        hide_scores<Element>(inputs, head, block, keys, scores);
        exponentials<Wide>(block, keys.count, scores, highest, sums, factors);
        for (int64_t column = 0; !first && column < block.columns; ++column) {
            const Scalar factor = factors[column];
            auto* const row = result + column * width;
            for (int64_t i = 0; factor != 1 && i < inputs.size; ++i) row[i] *= factor;
        }
        add_product<Wide>({scores, 1, block.stride, keys.values, keys.value_row, result, width, block.columns,
                           inputs.size, keys.count, first});
        first = false;
    });
    const int64_t first_row = row_of_output(inputs, head, block);
    for_each_column(block, [&](int64_t column, int64_t token, int64_t of_shared) {
        const int64_t row = first_row + token * inputs.heads + of_shared;
        store_row<Element>(result + column * width, inputs.size, 1 / sums[column],
                           static_cast<typename Element::Storage*>(call.output) + row * inputs.size);
        static_cast<Scalar*>(call.log_sums)[row] =
            (Scalar)((double)highest[column] + __builtin_log((double)sums[column]));
    });
}

template <typename Element>
void forward(const PackedAttentionForward& call, int64_t task, void* memory) {
    const AttentionScratch scratch = attention_scratch(call.inputs, 0);
    const int64_t key_heads = call.inputs.key_heads;
    const SequenceHead head = sequence_head(call.inputs, task / key_heads, task % key_heads);
    for (int64_t first = 0; first < head.length; first += tokens_of_block(head.shared)) {
        forward_block<Element>(call, head, query_block<Element>(head, first), scratch,
                               static_cast<typename Element::Scalar*>(memory));
    }
}

// z to p and dp to dz, without the scale.
template <typename Element>
void score_gradients(const QueryBlock& block, int64_t keys, const typename Element::Scalar* log_sums,
                     const typename Element::Scalar* sums, typename Element::Scalar* scores,
                     typename Element::Scalar* products) {
    for (int64_t column = 0; column < block.stride; column += lanes<Element>()) {
        const auto log_sum = Element::load(log_sums + column);
        const auto sum = Element::load(sums + column);
        for (int64_t key = 0; key < keys; ++key) {
            const int64_t at = key * block.stride + column;
            const auto p = exp_nonpositive(Element::load(scores + at) - log_sum);
            Element::store(scores + at, p);
            Element::store(products + at, p * (Element::load(products + at) - sum));
        }
    }
}

// Where gradients of keys go, by rows: of the sequence's own, or of its prefix for this sequence alone.
template <typename Scalar>
struct KeyGradients {
    Scalar* keys;
    Scalar* values;
    int64_t row;
};

// log(sum(exp(z))) and sum(do o) of each column.
template <typename Element>
void load_sums(const PackedAttentionBackward& call, const SequenceHead& head, const QueryBlock& block,
               const typename Element::Scalar* above, int64_t width, typename Element::Scalar* log_sums,
               typename Element::Scalar* sums) {
    using Scalar = typename Element::Scalar;
    constexpr int64_t kLanes = lanes<Element>();
    const int64_t size = call.inputs.size;
    const int64_t first_row = row_of_output(call.inputs, head, block);
    for_each_column(block, [&](int64_t column, int64_t token, int64_t of_shared) {
        const int64_t row = first_row + token * call.inputs.heads + of_shared;
        const auto* output = static_cast<const typename Element::Storage*>(call.output) + row * size;
        typename Element::Vector sum = {};
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            sum += Element::load(output + i) * load_unaligned<typename Element::Vector>(above + column * width + i);
        }
        if (i < size) {
            sum += load_partial<Element>(output + i, size - i, 0) *
                   load_unaligned<typename Element::Vector>(above + column * width + i);
        }
        sums[column] = (Scalar)sum_of_lanes(sum);
        log_sums[column] = static_cast<const Scalar*>(call.log_sums)[row];
    });
    for (int64_t column = block.columns; column < block.stride; ++column) log_sums[column] = sums[column] = 0;
}

// How many of a block's keys, which are the prefix's or the sequence's own from `from` on, an earlier block of the
// sequence's queries has seen: they begin with those, and gradients of the others have nothing to be added to.
template <typename Scalar>
int64_t keys_seen_before(const QueryBlock& block, const KeyBlock<Scalar>& keys, int64_t from) {
    if (keys.of_prefix) return block.first == 0 ? 0 : keys.count;
    return smaller(keys.count, larger(0, block.first - from));
}

template <typename Scalar>
struct Rows {
    Scalar* data;
    int64_t row;
};

// Sums over the columns of a weight times the column's row, for each key; written over those that are not yet known.
template <typename Element>
void add_rows_of_keys(const typename Element::Scalar* weights, const typename Element::Scalar* of_columns,
                      int64_t width, const QueryBlock& block, const Rows<typename Element::Scalar>& to, int64_t known,
                      int64_t count, int64_t size) {
    add_product<Element>({weights, block.stride, 1, of_columns, width, to.data, to.row, known, size, block.columns});
    add_product<Element>({weights + known * block.stride, block.stride, 1, of_columns, width, to.data + known * to.row,
                          to.row, count - known, size, block.columns, true});
}

template <typename Element>
void backward_block(const PackedAttentionBackward& call, const SequenceHead& head, const QueryBlock& block,
                    const AttentionScratch& scratch, typename Element::Scalar* memory,
                    const KeyGradients<typename Element::Scalar>& own,
                    const KeyGradients<typename Element::Scalar>& of_prefix) {
    using Scalar = typename Element::Scalar;
    using Wide = typename Accumulator<Element>::Type;
    const PackedAttention& inputs = call.inputs;
    const int64_t size = inputs.size, width = scratch.width, stride = block.stride;
    auto* const queries = memory + scratch.queries;
    auto* const above = memory + scratch.above;
    auto* const result = memory + scratch.result;
    auto* const scores = memory + scratch.scores;
    auto* const products = memory + scratch.products;
    load_block<Element>(inputs.query, head, block, size, width, (Scalar)inputs.scale, queries,
                        memory + scratch.transposed_queries);
    load_block<Element>(call.above, head, block, size, width, 1, above, memory + scratch.transposed_above);
    load_sums<Element>(call, head, block, above, width, memory + scratch.log_sums, memory + scratch.sums);
    bool first = true;
    for_each_key_block<Element>(inputs, head, block, scratch, memory, [&](const KeyBlock<Scalar>& keys) {
        products_with_keys<Element>(keys.keys, keys.key_row, keys.count, memory + scratch.transposed_queries, block,
                                    size, scores);
        hide_scores<Element>(inputs, head, block, keys, scores);
        products_with_keys<Element>(keys.values, keys.value_row, keys.count, memory + scratch.transposed_above, block,
                                    size, products);
        score_gradients<Wide>(block, keys.count, memory + scratch.log_sums, memory + scratch.sums, scores, products);
        add_product<Wide>(
            {products, 1, stride, keys.keys, keys.key_row, result, width, block.columns, size, keys.count, first});
        first = false;
        const KeyGradients<Scalar>& to = keys.of_prefix ? of_prefix : own;
        if (to.keys == nullptr) return;
        const int64_t from = keys.of_prefix ? keys.place : keys.place - head.prefix;
        const int64_t known = keys_seen_before(block, keys, from);
        add_rows_of_keys<Wide>(products, queries, width, block, {to.keys + from * to.row, to.row}, known, keys.count,
                               size);
        add_rows_of_keys<Wide>(scores, above, width, block, {to.values + from * to.row, to.row}, known, keys.count,
                               size);
    });
    const int64_t first_row = row_of_output(inputs, head, block);
    for_each_column(block, [&](int64_t column, int64_t token, int64_t of_shared) {
        const int64_t row = first_row + token * inputs.heads + of_shared;
        store_row<Element>(result + column * width, size, (Scalar)inputs.scale,
                           static_cast<typename Element::Storage*>(call.query_gradient) + row * size);
    });
}

// Adds rows of one sequence, weighted, to the sums of `count` weights; weights and sums are so far from one another.
template <typename Element, int count>
void add_weighted(const typename Element::Scalar* from, int64_t from_row, int64_t rows, int64_t size,
                  const typename Element::Scalar* all_weights, int64_t weights_apart, typename Element::Scalar* sums,
                  int64_t apart) {
    typename Element::Scalar weights[count];
    for (int label = 0; label < count; ++label) weights[label] = all_weights[label * weights_apart];
    constexpr int64_t kLanes = lanes<Element>();
    for (int64_t row = 0; row < rows; ++row, from += from_row, sums += size) {
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            const auto found = Element::load(from + i);
            for (int label = 0; label < count; ++label) {
                auto* const to = sums + label * apart + i;
                Element::store(to, Element::load(to) + found * weights[label]);
            }
        }
        for (; i < size; ++i) {
            for (int label = 0; label < count; ++label) sums[label * apart + i] += from[i] * weights[label];
        }
    }
}

// The same for any number of weights, two at a time.
template <typename Element>
void add_with_every_weight(const PackedAttentionBackward& call, const SequenceHead& head,
                           const typename Element::Scalar* from, int64_t from_row, int64_t rows,
                           typename Element::Scalar* sums, int64_t apart) {
    const int64_t weights_apart = call.weight_rows;
    const auto* weights = static_cast<const typename Element::Scalar*>(call.weights) + head.sequence->row;
    int64_t label = 0;
    for (; label + 2 <= call.n_weights; label += 2) {
        add_weighted<Element, 2>(from, from_row, rows, call.inputs.size, weights + label * weights_apart, weights_apart,
                                 sums + label * apart, apart);
    }
    if (label < call.n_weights) {
        add_weighted<Element, 1>(from, from_row, rows, call.inputs.size, weights + label * weights_apart, weights_apart,
                                 sums + label * apart, apart);
    }
}

template <typename Element>
void backward_sequence(const PackedAttentionBackward& call, const SequenceHead& head, const AttentionScratch& scratch,
                       typename Element::Scalar* memory, const KeyGradients<typename Element::Scalar>& sums) {
    using Scalar = typename Element::Scalar;
    using Wide = typename Accumulator<Element>::Type;
    const PackedAttention& inputs = call.inputs;
    const int64_t offset = (head.sequence->begin * inputs.key_heads + head.key_head) * inputs.size;
    const KeyGradients<Scalar> own = {static_cast<Scalar*>(call.key_gradient) + offset,
                                      static_cast<Scalar*>(call.value_gradient) + offset,
                                      inputs.key_heads * inputs.size};
    KeyGradients<Scalar> of_prefix = {nullptr, nullptr, scratch.width};
    if (sums.keys != nullptr) {
        of_prefix.keys = memory + scratch.prefix;
        of_prefix.values = of_prefix.keys + head.prefix * scratch.width;
    }
    for (int64_t first = 0; first < head.length; first += tokens_of_block(head.shared)) {
        backward_block<Element>(call, head, query_block<Element>(head, first), scratch, memory, own, of_prefix);
    }
    if (sums.keys == nullptr || head.length == 0) return;
    // The first query sees the most of the prefix.
    const int64_t unseen = larger(0, head.prefix - inputs.window + 1);
    const int64_t seen = larger(0, head.prefix - unseen);
    add_with_every_weight<Wide>(call, head, of_prefix.keys + unseen * scratch.width, scratch.width, seen,
                                sums.keys + unseen * inputs.size, sums.row);
    add_with_every_weight<Wide>(call, head, of_prefix.values + unseen * scratch.width, scratch.width, seen,
                                sums.values + unseen * inputs.size, sums.row);
}

template <typename Element>
void backward(const PackedAttentionBackward& call, int64_t task, void* memory) {
    using Scalar = typename Element::Scalar;
    const PackedAttention& inputs = call.inputs;
    const AttentionScratch scratch = attention_scratch(inputs, 0);
    const int64_t key_head = task % inputs.key_heads;
    const int64_t* run = call.runs + task / inputs.key_heads;
    // Sums of one weight stand this far behind those of the one before.
    KeyGradients<Scalar> sums = {nullptr, nullptr, inputs.key_heads * call.prefix_tokens * inputs.size};
    for (int64_t index = run[0]; index < run[1]; ++index) {
        const SequenceHead head = sequence_head(inputs, index, key_head);
        if (index == run[0] && call.prefix_key_sums != nullptr && head.prefix > 0) {
            const int64_t offset = (key_head * call.prefix_tokens + head.sequence->prefix_begin) * inputs.size;
            sums.keys = static_cast<Scalar*>(call.prefix_key_sums) + offset;
            sums.values = static_cast<Scalar*>(call.prefix_value_sums) + offset;
            for (int64_t label = 0; label < call.n_weights; ++label) {
                __builtin_memset(sums.keys + label * sums.row, 0, sizeof(Scalar) * head.prefix * inputs.size);
                __builtin_memset(sums.values + label * sums.row, 0, sizeof(Scalar) * head.prefix * inputs.size);
            }
        }
        backward_sequence<Element>(call, head, scratch, static_cast<Scalar*>(memory), sums);
    }
}

}  // namespace

namespace entropy_fast {
namespace cpu {
namespace ENTROPY_FAST_VARIANT {

void packed_attention_forward(const PackedAttentionForward& call, int64_t task, void* scratch) {
    switch (call.element_type) {
        case ElementType::kFloat32:
            return forward<Float32>(call, task, scratch);
        case ElementType::kFloat64:
            return forward<Float64>(call, task, scratch);
        case ElementType::kBFloat16:
            return forward<BFloat16>(call, task, scratch);
        case ElementType::kFloat16:
            return;
    }
}

void packed_attention_backward(const PackedAttentionBackward& call, int64_t task, void* scratch) {
    switch (call.element_type) {
        case ElementType::kFloat32:
            return backward<Float32>(call, task, scratch);
        case ElementType::kFloat64:
            return backward<Float64>(call, task, scratch);
        case ElementType::kBFloat16:
            return backward<BFloat16>(call, task, scratch);
        case ElementType::kFloat16:
            return;
    }
}

}  // namespace ENTROPY_FAST_VARIANT
}  // namespace cpu
}  // namespace entropy_fast
