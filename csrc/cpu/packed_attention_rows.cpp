// Packed attention, a task at a time. Compiled once per instruction set, with ENTROPY_FAST_VARIANT naming the build.
#include <stdint.h>

#include "attention_softmax.h"
#include "variants.h"

namespace {

using entropy_fast::PackedAttentionBackward;
using entropy_fast::PackedAttentionForward;

// Where in [tokens, heads] a block begins.
int64_t row_of_output(const PackedAttention& inputs, const SequenceHead& head, const QueryBlock& block) {
    return (head.sequence->begin + block.first) * inputs.heads + head.key_head * block.shared;
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
    auto* const scores = memory + scratch.elements;
    auto* const highest = memory + scratch.highest;
    auto* const sums = memory + scratch.sums;
    auto* const factors = memory + scratch.queries;  // whose rows the forward needs no more once they are transposed
    load_block<Element>(inputs.query, head, block, inputs.size, width, (Scalar)inputs.scale, memory + scratch.queries,
                        queries);
    load_sinks(inputs, head, block, highest);
    for (int64_t column = 0; column < block.stride; ++column) sums[column] = inputs.sinks == nullptr ? 0 : 1;
    bool first = true;
    for_each_key_block<Element>(inputs, head, block, scratch, memory, [&](const KeyBlock<Scalar>& keys) {
        products_with_keys<Element>(keys.keys, keys.key_row, keys.count, queries, block, inputs.size, scores,
                                    block.stride);
        hide_scores<Element>(inputs, head, block, keys, scores, block.stride);
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
    });
}

template <typename Element>
void forward(const PackedAttentionForward& call, int64_t task, void* memory) {
    const AttentionScratch scratch = attention_scratch(call.inputs);
    const int64_t key_heads = call.inputs.key_heads;
    const SequenceHead head = sequence_head(call.inputs, task / key_heads, task % key_heads);
    for (int64_t first = 0; first < head.length; first += tokens_of_block(head.shared)) {
        forward_block<Element>(call, head, query_block<Element>(head, first), scratch,
                               static_cast<typename Element::Scalar*>(memory));
    }
}

// Where gradients of keys go, by rows: of the sequence's own, or of its prefix for this sequence alone.
template <typename Scalar>
struct KeyGradients {
    Scalar* keys;
    Scalar* values;
    int64_t row;
};

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
    const int64_t row = apart(block);
    add_product<Element>({weights, row, 1, of_columns, width, to.data, to.row, known, size, block.columns});
    add_product<Element>({weights + known * row, row, 1, of_columns, width, to.data + known * to.row, to.row,
                          count - known, size, block.columns, true});
}

// p and dp of all keys that the queries of a block see, and what belongs to them (attention_scratch.h).
template <typename Element>
void look_at_keys(const PackedAttentionBackward& call, const SequenceHead& head, const QueryBlock& block,
                  const AttentionScratch& scratch, typename Element::Scalar* memory, typename Element::Scalar* scores) {
    using Scalar = typename Element::Scalar;
    using Wide = typename Accumulator<Element>::Type;
    const PackedAttention& inputs = call.inputs;
    auto* const highest = memory + scratch.highest;
    auto* const of_highest = memory + scratch.of_highest;
    load_sinks(inputs, head, block, highest);
    load_sinks(inputs, head, block, memory + scratch.sums);
    __builtin_memset(of_highest, 0, sizeof(Scalar) * block.stride);
    int64_t seen = 0;
    for_each_key_block<Element>(inputs, head, block, scratch, memory, [&](const KeyBlock<Scalar>& keys) {
        auto* const z = scores + seen * apart(block);
        products_with_keys<Element>(keys.keys, keys.key_row, keys.count, memory + scratch.transposed_queries, block,
                                    inputs.size, z, apart(block));
        hide_scores<Element>(inputs, head, block, keys, z, apart(block));
        products_with_keys<Element>(keys.values, keys.value_row, keys.count, memory + scratch.transposed_above, block,
                                    inputs.size, z + block.stride, apart(block));
        find_highest<Wide>(block, keys.count, z, highest, of_highest);
        seen += keys.count;
    });
    probabilities<Wide>(block, seen, scores, highest, of_highest, memory + scratch.sums, memory + scratch.changes);
}

template <typename Element>
void backward_block(const PackedAttentionBackward& call, const SequenceHead& head, const QueryBlock& block,
                    const AttentionScratch& scratch, typename Element::Scalar* memory, typename Element::Scalar* scores,
                    const KeyGradients<typename Element::Scalar>& own,
                    const KeyGradients<typename Element::Scalar>& of_prefix) {
    using Scalar = typename Element::Scalar;
    using Wide = typename Accumulator<Element>::Type;
    const PackedAttention& inputs = call.inputs;
    const int64_t size = inputs.size, width = scratch.width, row = apart(block);
    auto* const queries = memory + scratch.queries;
    auto* const above = memory + scratch.above;
    auto* const result = memory + scratch.result;
    auto* const sums = memory + scratch.sums;
    load_block<Element>(inputs.query, head, block, size, width, (Scalar)inputs.scale, queries,
                        memory + scratch.transposed_queries);
    load_block<Element>(call.above, head, block, size, width, 1, above, memory + scratch.transposed_above);
    look_at_keys<Element>(call, head, block, scratch, memory, scores);
    // What p and dz are too large by is taken from the rows that they multiply.
    for (int64_t column = 0; column < block.columns; ++column) {
        const Scalar inverse = 1 / sums[column];
        for (int64_t i = 0; i < size; ++i) {
            queries[column * width + i] *= inverse;
            above[column * width + i] *= inverse;
        }
    }
    int64_t seen = 0;
    for_each_key_block<Element>(inputs, head, block, scratch, memory, [&](const KeyBlock<Scalar>& keys) {
        auto* const p = scores + seen * row;
        auto* const dz = p + block.stride;
        score_gradients<Wide>(block, keys.count, memory + scratch.of_highest, memory + scratch.changes, p);
        add_product<Wide>(
            {dz, 1, row, keys.keys, keys.key_row, result, width, block.columns, size, keys.count, seen == 0});
        seen += keys.count;
        const KeyGradients<Scalar>& to = keys.of_prefix ? of_prefix : own;
        if (to.keys == nullptr) return;
        const int64_t from = keys.of_prefix ? keys.place : keys.place - head.prefix;
        const int64_t known = keys_seen_before(block, keys, from);
        add_rows_of_keys<Wide>(dz, queries, width, block, {to.keys + from * to.row, to.row}, known, keys.count, size);
        add_rows_of_keys<Wide>(p, above, width, block, {to.values + from * to.row, to.row}, known, keys.count, size);
    });
    const int64_t first_row = row_of_output(inputs, head, block);
    for_each_column(block, [&](int64_t column, int64_t token, int64_t of_shared) {
        const int64_t to = first_row + token * inputs.heads + of_shared;
        store_row<Element>(result + column * width, size, (Scalar)inputs.scale / sums[column],
                           static_cast<typename Element::Storage*>(call.query_gradient) + to * size);
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
    Scalar* scores = memory + scratch.elements;
    if (sums.keys != nullptr) {
        of_prefix.keys = scores;
        of_prefix.values = of_prefix.keys + head.prefix * scratch.width;
        scores = of_prefix.values + head.prefix * scratch.width;
    }
    for (int64_t first = 0; first < head.length; first += tokens_of_block(head.shared)) {
        backward_block<Element>(call, head, query_block<Element>(head, first), scratch, memory, scores, own, of_prefix);
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
    const AttentionScratch scratch = attention_scratch(inputs);
    const int64_t key_head = task % inputs.key_heads;
    const int64_t* run = call.runs + task / inputs.key_heads;
    // Sums of one weight stand this far behind those of the one before.
    KeyGradients<Scalar> sums = {nullptr, nullptr, inputs.key_heads * inputs.prefix_tokens * inputs.size};
    for (int64_t index = run[0]; index < run[1]; ++index) {
        const SequenceHead head = sequence_head(inputs, index, key_head);
        if (index == run[0] && call.prefix_key_sums != nullptr && head.prefix > 0) {
            const int64_t offset = (key_head * inputs.prefix_tokens + head.sequence->prefix_begin) * inputs.size;
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
