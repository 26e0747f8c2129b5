// How packed attention is cut into blocks, and what a thread needs memory for.
//
// Included by the host and by sources that are compiled once per instruction set, hence the internal linkage.
#pragma once

#include <stdint.h>

#include "../packed_attention.h"

namespace {

// Scores of a block of queries with a block of keys, [keys, columns], stay in the nearest caches.
constexpr int64_t kKeysOfBlock = 128;
constexpr int64_t kColumnsOfBlock = 64;

// A block has a column for every token and every query head of a key head. More tokens would share the keys, but
// also have more scores past the causal limit.
inline int64_t tokens_of_block(int64_t shared) {
    if (shared == 1) return kColumnsOfBlock / 2;
    return shared < kColumnsOfBlock ? kColumnsOfBlock / shared : 1;
}

// Filled up to whole vectors of any width.
inline int64_t columns_of_block(int64_t shared) {
    constexpr int64_t kLine = 64 / sizeof(float);
    return (tokens_of_block(shared) * shared + kLine - 1) / kLine * kLine;
}

// Offsets into a thread's scratch memory, in elements of Scalar. Each begins a cache line.
struct AttentionScratch {
    int64_t width;               // from a row of `size` elements to the next
    int64_t queries;             // [columns, width]: scale q, of a block of queries
    int64_t transposed_queries;  // [size, columns]
    int64_t result;              // [columns, width]: o or dq
    int64_t keys;                // [keys, width]: k where it is not of Scalar
    int64_t values;              // likewise v
    int64_t highest;             // [columns]: score so far
    int64_t sums;                // [columns]: of exp(z - highest)
    int64_t of_highest;          // [columns]: dp at the highest score. This and the next three are the backward's alone
    int64_t changes;             // [columns]: sum of p (dp - of_highest)
    int64_t above;               // [columns, width]: do
    int64_t transposed_above;    // [size, columns]
    // Here the forward has scores, [keys, columns] of one block of keys. The backward has dk and dv of one sequence,
    // [2, tokens of a prefix, width], and then [keys, 2, columns] of all keys that a block of queries sees: z, then p,
    // and beside it dp, then dz.
    int64_t elements;
};

inline AttentionScratch attention_scratch(const entropy_fast::PackedAttention& inputs) {
    constexpr int64_t kLine = 64 / sizeof(float);
    AttentionScratch scratch = {};
    const auto take = [&](int64_t elements) {
        const int64_t offset = scratch.elements;
        scratch.elements += (elements + kLine - 1) / kLine * kLine;
        return offset;
    };
    const int64_t shared = inputs.heads / inputs.key_heads;
    const int64_t columns = columns_of_block(shared);
    scratch.width = (inputs.size + kLine - 1) / kLine * kLine;
    scratch.queries = take(columns * scratch.width);
    scratch.transposed_queries = take(scratch.width * columns);
    scratch.result = take(columns * scratch.width);
    scratch.keys = take(kKeysOfBlock * scratch.width);
    scratch.values = take(kKeysOfBlock * scratch.width);
    scratch.highest = take(columns);
    scratch.sums = take(columns);
    scratch.of_highest = take(columns);
    scratch.changes = take(columns);
    scratch.above = take(columns * scratch.width);
    scratch.transposed_above = take(scratch.width * columns);
    return scratch;
}

}  // namespace
