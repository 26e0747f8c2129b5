// What forward and backward of packed attention have in common: blocks of queries and of keys, and their scores.
//
// Scores of a block are kept transposed, [keys, columns], a column for every token and query head: products then read
// keys and values where they are, only queries have to be transposed, and a query's maximum and sum run down a column,
// side by side with those of its neighbours. Included only by sources that are compiled once per instruction set.
#pragma once

#include "attention_scratch.h"
#include "simd.h"
#include "small_product.h"

namespace {

using entropy_fast::AttentionOperand;
using entropy_fast::AttentionSequence;
using entropy_fast::PackedAttention;

// In which type each element type is computed with.
template <typename Element>
struct Accumulator {
    using Type = Float32;
};
template <>
struct Accumulator<Float64> {
    using Type = Float64;
};

template <typename Scalar>
constexpr Scalar negative_infinity() {
    return -(Scalar)__builtin_inf();
}

inline int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One sequence and one key head.
struct SequenceHead {
    const AttentionSequence* sequence;
    int64_t key_head;
    int64_t shared;  // query heads of the key head
    int64_t length;
    int64_t prefix;
};

inline SequenceHead sequence_head(const PackedAttention& inputs, int64_t index, int64_t key_head) {
    const AttentionSequence* sequence = inputs.sequences + index;
    return {sequence, key_head, inputs.heads / inputs.key_heads, sequence->end - sequence->begin,
            sequence->prefix_end - sequence->prefix_begin};
}

// Tokens [first, first + tokens) of a sequence. Column: token * shared + query head.
struct QueryBlock {
    int64_t first;
    int64_t tokens;
    int64_t shared;
    int64_t columns;
    int64_t stride;  // columns, filled up to whole vectors
};

template <typename Element>
QueryBlock query_block(const SequenceHead& head, int64_t first) {
    const int64_t tokens = smaller(tokens_of_block(head.shared), head.length - first);
    const int64_t columns = tokens * head.shared;
    return {first, tokens, head.shared, columns, rounded_up(columns, lanes<typename Accumulator<Element>::Type>())};
}

// Calls visit(column, token, query head), the latter two counted from the first of the block. A division for each
// column would take as long as what is done for it.
template <typename Visit>
void for_each_column(const QueryBlock& block, const Visit& visit) {
    int64_t column = 0;
    for (int64_t token = 0; token < block.tokens; ++token) {
        for (int64_t of_shared = 0; of_shared < block.shared; ++of_shared) visit(column++, token, of_shared);
    }
}

// Keys of places [place, place + count) with their values, by rows.
template <typename Scalar>
struct KeyBlock {
    const Scalar* keys;
    const Scalar* values;
    int64_t key_row;
    int64_t value_row;
    int64_t place;
    int64_t count;
    bool of_prefix;
};

// size elements times factor, filled up with zeros to whole vectors.
template <typename Element>
void load_row(const typename Element::Storage* from, int64_t size, typename Element::Scalar factor,
              typename Element::Scalar* to) {
    constexpr int64_t kLanes = lanes<Element>();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store_unaligned(to + i, Element::load(from + i) * factor);
    if (i < size) store_unaligned(to + i, load_partial<Element>(from + i, size - i, 0) * factor);
}

template <typename Element>
void store_row(const typename Element::Scalar* from, int64_t size, typename Element::Scalar factor,
               typename Element::Storage* to) {
    using Vector = typename Element::Vector;
    constexpr int64_t kLanes = lanes<Element>();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) Element::store(to + i, load_unaligned<Vector>(from + i) * factor);
    if (i < size) store_tail<Element>(to + i, load_unaligned<Vector>(from + i) * factor, size - i);
}

// a0 b0 a1 b1 ... of the lower or the upper halves.
template <typename Vector, typename Indices>
Vector interleaved(Vector a, Vector b, bool upper) {
    constexpr int kLanes = sizeof(Vector) / sizeof(Vector{}[0]);
    const int half = upper ? kLanes / 2 : 0;
#if defined(__clang__)
    Vector result;
    for (int i = 0; i < kLanes; ++i) result[i] = i % 2 ? b[half + i / 2] : a[half + i / 2];
    return result;
#else
    Indices indices;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) indices[i] = half + i / 2 + (i % 2 ? kLanes : 0);
    return __builtin_shuffle(a, b, indices);
#endif
}

inline f32v interleaved(f32v a, f32v b, bool upper) { return interleaved<f32v, i32v>(a, b, upper); }
inline f64v interleaved(f64v a, f64v b, bool upper) { return interleaved<f64v, i64v>(a, b, upper); }

// A square of whole vectors. Interleaving rows i and i + n/2 moves the highest bit of an element's row behind the bits
// of its column; after log2(n) times row and column have changed places.
template <typename Element>
void transpose_square(const typename Element::Scalar* from, int64_t from_row, typename Element::Scalar* to,
                      int64_t to_row) {
    using Vector = typename Element::Vector;
    constexpr int kLanes = lanes<Element>();
    Vector rows[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = Element::load(from + i * from_row);
#pragma GCC unroll 4
    for (int done = 1; done < kLanes; done *= 2) {
        Vector next[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = interleaved(rows[i], rows[i + kLanes / 2], false);
            next[2 * i + 1] = interleaved(rows[i], rows[i + kLanes / 2], true);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) Element::store(to + i * to_row, rows[i]);
}

// A block of queries (or of what is laid out like them) times factor: by rows, a column's row each, and transposed.
template <typename Element>
void load_block(const AttentionOperand& operand, const SequenceHead& head, const QueryBlock& block, int64_t size,
                int64_t width, typename Element::Scalar factor, typename Element::Scalar* rows,
                typename Element::Scalar* transposed) {
    using Wide = typename Accumulator<Element>::Type;
    constexpr int64_t kLanes = lanes<Wide>();
    const auto* from = static_cast<const typename Element::Storage*>(operand.data) +
                       head.key_head * head.shared * operand.head_stride +
                       (head.sequence->begin + block.first) * operand.token_stride;
    for_each_column(block, [&](int64_t column, int64_t token, int64_t of_shared) {
        load_row<Element>(from + token * operand.token_stride + of_shared * operand.head_stride, size, factor,
                          rows + column * width);
    });
    // What fills up the columns is computed with, and never looked at.
    const int64_t missing = block.stride - block.columns;
    __builtin_memset(rows + block.columns * width, 0, sizeof(*rows) * missing * width);
    for (int64_t column = 0; column < block.stride; column += kLanes) {
        for (int64_t i = 0; i < size; i += kLanes) {
            transpose_square<Wide>(rows + column * width + i, width, transposed + i * block.stride + column,
                                   block.stride);
        }
    }
}

template <typename Element>
const typename Element::Scalar* load_keys(const AttentionOperand& operand, int64_t key_head, int64_t token,
                                          int64_t count, int64_t size, int64_t width, typename Element::Scalar* scratch,
                                          int64_t* row) {
    const auto* from = static_cast<const typename Element::Storage*>(operand.data) + key_head * operand.head_stride +
                       token * operand.token_stride;
    if constexpr (sizeof(*from) == sizeof(*scratch)) {
        *row = operand.token_stride;
        return from;
    } else {
        for (int64_t i = 0; i < count; ++i) {
            load_row<Element>(from + i * operand.token_stride, size, 1, scratch + i * width);
        }
        *row = width;
        return scratch;
    }
}

// Place of the first key that a query of the block sees.
inline int64_t lowest_place(const PackedAttention& inputs, const SequenceHead& head, const QueryBlock& block) {
    return larger(0, head.prefix + block.first - inputs.window + 1);
}

// Calls visit(key block) for what the queries of a block see: keys of the prefix, then of the sequence itself.
template <typename Element, typename Visit>
void for_each_key_block(const PackedAttention& inputs, const SequenceHead& head, const QueryBlock& block,
                        const AttentionScratch& scratch, typename Element::Scalar* memory, const Visit& visit) {
    const int64_t end = head.prefix + block.first + block.tokens;
    for (int64_t place = lowest_place(inputs, head, block); place < end;) {
        const bool of_prefix = place < head.prefix;
        const int64_t count = smaller(kKeysOfBlock, (of_prefix ? head.prefix : end) - place);
        const int64_t token =
            of_prefix ? head.sequence->prefix_begin + place : head.sequence->begin + place - head.prefix;
        KeyBlock<typename Element::Scalar> keys = {nullptr, nullptr, 0, 0, place, count, of_prefix};
        keys.keys = load_keys<Element>(of_prefix ? inputs.prefix_key : inputs.key, head.key_head, token, count,
                                       inputs.size, scratch.width, memory + scratch.keys, &keys.key_row);
        keys.values = load_keys<Element>(of_prefix ? inputs.prefix_value : inputs.value, head.key_head, token, count,
                                         inputs.size, scratch.width, memory + scratch.values, &keys.value_row);
        visit(keys);
        place += count;
    }
}

// [keys, columns] products of rows of keys with the columns of queries; of a row of products to the next it is `apart`.
template <typename Element>
void products_with_keys(const typename Element::Scalar* rows, int64_t row, int64_t count,
                        const typename Element::Scalar* transposed, const QueryBlock& block, int64_t size,
                        typename Element::Scalar* products, int64_t apart) {
    add_product<typename Accumulator<Element>::Type>(
        {rows, row, 1, transposed, block.stride, products, apart, count, block.stride, size, true});
}

// -inf for keys that a query does not see: those after it, and those before its window.
template <typename Element>
void hide_scores(const PackedAttention& inputs, const SequenceHead& head, const QueryBlock& block,
                 const KeyBlock<typename Element::Scalar>& keys, typename Element::Scalar* scores, int64_t apart) {
    constexpr auto kHidden = negative_infinity<typename Element::Scalar>();
    for (int64_t key = 0; key < keys.count; ++key) {
        // Of the block's tokens, [first, end) see the key.
        const int64_t distance = keys.place + key - head.prefix - block.first;
        const int64_t first = larger(0, distance) * block.shared;
        const int64_t end = smaller(block.tokens, distance + inputs.window) * block.shared;
        auto* row = scores + key * apart;
        for (int64_t column = 0; column < first; ++column) row[column] = kHidden;
        for (int64_t column = end; column < block.columns; ++column) row[column] = kHidden;
    }
}

}  // namespace
