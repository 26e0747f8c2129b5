// One block of the vocabulary on the way from hidden states to log-probabilities: what the host hands to the kernel.
//
// linear_token_logprobs goes through the vocabulary in blocks. Of each block's products x = h W^T it keeps a few
// numbers a row and turns x itself into the weights of the next product, which gives the unit gradients
//     d logprob / d h = (1 - p_y) s_y W_y - sum_{v != y} p_v s_v W_v
//     d entropy / d h = -sum_v p_v (log p_v + entropy) s_v W_v
// with y the target and s_v = 1 - (z_v / softcap)^2 for logits z = softcap tanh(h W^T / softcap) (s = 1 without
// softcap). The target is kept out of both sums: for a likely token 1 - p_y would cancel.
//
// The weights are relative to a maximum `highest` that is raised only when a block passes it by more than
// kRaiseThreshold, and those of the entropy to a centre near E_p[z], for their sum would cancel otherwise. When either
// moves, the sums so far have to be rescaled:
//     sum1 <- sum1 factor,   sum2 <- (sum2 + center_shift sum1) factor     (sum1 on the right before its own update)
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace entropy_fast {

// State of one row between blocks. Start: highest -inf, at_target NaN, everything else 0.
struct SoftmaxRow {
    double highest;       // what is subtracted before the exponential
    double sum;           // sum_v exp(z_v - highest)
    double rest;          // the same without the target
    double weighted;      // sum_v exp(z_v - highest) (z_v - highest)
    double at_target;     // z of the target, once its block was seen
    double center;        // c in the weights of the entropy
    double factor;        // for the caller: how the last block rescaled, see above
    double center_shift;  // for the caller: old centre - new centre
};
static_assert(sizeof(SoftmaxRow) == 8 * sizeof(double), "rows of a [rows, 8] tensor of doubles");

struct SoftmaxBlock {
    // [rows, width]: z on the way in, exp(z - highest) s on the way out; 0 at the target, and throughout a row whose
    // sum is not finite
    void* logits;
    void* entropy_weights;   // [rows, width]: exp(z - highest) (z - center) s, with the same exceptions; or null
    const int64_t* targets;  // [rows]
    SoftmaxRow* state;       // [rows]
    int64_t rows;
    int64_t width;
    int64_t row_stride;   // of logits and of entropy_weights, in elements
    int64_t first_token;  // what column 0 is in the vocabulary
    double softcap;       // 0: none
    bool weights;         // false: only the state is wanted, and `logits` is left as it is
    ElementType element_type;
};

// What a block does to the sums of weights times W: they are rescaled as above and, where the product of the block's
// weights with its part of W is given, that is added. Rows whose factor is 1 and whose centre stayed are not touched
// without a product.
struct SumsOfBlocks {
    void* sums;                    // [rows, width] of Scalar (float, or double for double products)
    void* entropy_sums;            // likewise, or null
    const void* products;          // [rows, width] of element_type, or null
    const void* entropy_products;  // likewise; null exactly where products or entropy_sums is
    const SoftmaxRow* state;       // [rows]
    int64_t rows;
    int64_t width;
    ElementType element_type;
};

}  // namespace entropy_fast
