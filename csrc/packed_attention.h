// Causal attention over sequences packed end to end, some of which continue from the keys and values of a prefix that
// they share: what the host hands to the kernel.
//
// A sequence of T tokens behind P prefix tokens sees P + T keys. The query of token t, at place P + t, sees the keys
// at places (P + t - window, P + t]. For every query head, with z = scale q k and p = softmax(z):
//     o = p v,   dp = do v,   dz = p (dp - sum(p dp)),   dq = scale dz k,   dk = scale dz q,   dv = p do
// Query heads in a row of heads / key_heads share a key head, whose gradients are summed over them. A sink is one more
// score of every query of its head, of a key without a value.
//
// Where nearly all of p is on key m, dz is what is left of numbers that are far larger, and q may be large enough to
// show their rounding. So it is computed as p ((dp - dp_m) - sum(p (dp - dp_m))): nothing large is left to cancel. That
// takes p and dp of all keys of a query, which the backward keeps for a block of queries: nothing of the forward is
// used.
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace entropy_fast {

// [heads, tokens, size] of element_type; the elements of one head of a token stand next to one another.
struct AttentionOperand {
    const void* data;
    int64_t head_stride;  // in elements, as the next
    int64_t token_stride;
};

// Places in the packed rows: of the sequence's own tokens, and of its prefix in the row of prefixes.
struct AttentionSequence {
    int64_t begin;
    int64_t end;
    int64_t prefix_begin;
    int64_t prefix_end;
    int64_t row;  // whose weights are the sequence's
};
static_assert(sizeof(AttentionSequence) == 5 * sizeof(int64_t), "rows of a [sequences, 5] tensor of integers");

// What forward and backward begin with.
struct PackedAttention {
    AttentionOperand query;
    AttentionOperand key;
    AttentionOperand value;
    AttentionOperand prefix_key;  // null where no sequence has a prefix
    AttentionOperand prefix_value;
    const AttentionSequence* sequences;  // one behind the other, the first from token 0 on
    const void* sinks;                   // [heads] of Scalar; null where there are none
    int64_t n_sequences;
    int64_t tokens;
    int64_t prefix_tokens;
    int64_t heads;
    int64_t key_heads;
    int64_t size;    // of a head
    int64_t window;  // at least 1
    double scale;
};

// Scalar is float, or double for double inputs. Half-precision floats are not taken.
struct PackedAttentionForward {
    PackedAttention inputs;
    void* output;  // [tokens, heads, size] of element_type
    ElementType element_type;
};

struct PackedAttentionBackward {
    PackedAttention inputs;
    AttentionOperand above;  // gradient of the output
    // [n_runs + 1]: run r is the sequences [runs[r], runs[r + 1]), all of one prefix. Where sums of prefixes are
    // wanted, no other run has that prefix.
    const int64_t* runs;
    const void* weights;   // [n_weights, weight_rows] of Scalar: for the sums of prefixes; null where those are
    void* query_gradient;  // [tokens, heads, size] of element_type
    void* key_gradient;    // [tokens, key_heads, size] of Scalar
    void* value_gradient;  // likewise
    // [n_weights, key_heads, prefix_tokens, size] of Scalar: sums of weight x dk over a run's sequences.
    void* prefix_key_sums;
    void* prefix_value_sums;  // likewise of dv
    int64_t n_runs;
    int64_t n_weights;
    int64_t weight_rows;
    ElementType element_type;
};

}  // namespace entropy_fast
