// How packed attention is cut into blocks, and what a thread needs memory for.
//
// Included by the host and by sources that are compiled once per instruction set, hence the internal linkage.
#pragma once

#include <stdint.h>

#include "../packed_attention.h"

namespace {

// Scores of a block, [keys, columns], stay in the first-level cache.
constexpr int64_t kKeysOfBlock = 128;
constexpr int64_t kColumnsOfBlock = 64;

// A block has a column for every token and every query head of a key head. More tokens would share the keys, but
// also have more scores past the causal limit.
inline int64_t tokens_of_block(int64_t shared) {
    if (shared == 1) return kColumnsOfBlock / 2;
    return shared < kColumnsOfBlock ? kColumnsOfBlock / shared : 1;
}

// Offsets into a thread's scratch memory, in elements of Scalar. Each begins a cache line.
struct AttentionScratch {
    int64_t width;               // from a row of `size` elements to the next
    int64_t queries;             // [columns, width]: scale q, of a block of queries
    int64_t transposed_queries;  // [size, columns]
    int64_t result;              // [columns, width]: o or dq
    int64_t scores;              // [keys, columns]: z, then p
    int64_t keys;                // [keys, width]: k where it is not of Scalar
    int64_t values;              // likewise v
    int64_t log_sums;            // [columns], or the highest score so far
    int64_t sums;                // [columns]: of exp(z - highest), or of do o
    int64_t above;               // [columns, width]: do. The rest is the backward's alone
    int64_t transposed_above;    // [size, columns]
    int64_t products;            // [keys, columns]: dp, then dz
    int64_t prefix;              // [2, tokens of a prefix, width]: dk and dv of one sequence
    int64_t elements;
};

inline AttentionScratch attention_scratch(const entropy_fast::PackedAttention& inputs, int64_t longest_prefix) {
    constexpr int64_t kLine = 64 / sizeof(float);
    AttentionScratch scratch = {};
    const auto take = [&](int64_t elements) {
        const int64_t offset = scratch.elements;
        scratch.elements += (elements + kLine - 1) / kLine * kLine;
        return offset;
    };
    const int64_t shared = inputs.heads / inputs.key_heads;
    const int64_t columns = (tokens_of_block(shared) * shared + kLine - 1) / kLine * kLine;
    scratch.width = (inputs.size + kLine - 1) / kLine * kLine;
    scratch.queries = take(columns * scratch.width);
    scratch.transposed_queries = take(scratch.width * columns);
    scratch.result = take(columns * scratch.width);
    scratch.scores = take(kKeysOfBlock * columns);
    scratch.keys = take(kKeysOfBlock * scratch.width);
    scratch.values = take(kKeysOfBlock * scratch.width);
    scratch.log_sums = take(columns);
    scratch.sums = take(columns);
    scratch.above = take(columns * scratch.width);
    scratch.transposed_above = take(scratch.width * columns);
    scratch.products = take(kKeysOfBlock * columns);
    scratch.prefix = take(2 * longest_prefix * scratch.width);
    return scratch;
}

}  // namespace
