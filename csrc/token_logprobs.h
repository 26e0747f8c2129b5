// Log-probabilities of chosen tokens: what the host hands to the kernels of either device.
//
// With x = logits[row], t = targets[row]:
//     lse     = log(sum_v exp(x_v))
//     logprob = x_t - lse
//     entropy = -sum_v p_v log p_v,   p_v = exp(x_v - lse)
//     d logits_v = d_logprob ([v = t] - p_v) + d_lse p_v - d_entropy p_v (log p_v + entropy)
//
// A row whose target is `ignore_index` is not read; its logprob, lse, entropy and gradient are 0.
// lse and entropy are always double: in float, exp(x - lse) at logits near 1e4 would carry a relative error of 5e-4.
// A token with p = 0 adds 0 to the entropy, and gets 0 of its gradient.
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace entropy_fast {

// `Scalar` (float, or double for double logits) is the type of logprob and of its gradient.
struct TokenLogprobsForward {
    const void* logits;  // [rows, vocabulary], rows `row_stride` elements apart
    const int64_t* targets;
    void* logprob;    // [rows] of Scalar
    double* lse;      // [rows]
    double* entropy;  // [rows], or null when it is not wanted
    int64_t rows;
    int64_t vocabulary;
    int64_t row_stride;
    int64_t ignore_index;
    ElementType element_type;
};

struct TokenLogprobsBackward {
    const void* logits;
    const int64_t* targets;
    const double* lse;
    const double* entropy;       // [rows]; null exactly where grad_entropy is
    const void* grad_logprob;    // [rows] of Scalar
    const double* grad_lse;      // [rows]
    const double* grad_entropy;  // [rows], or null for none
    void* grad_logits;           // [rows, vocabulary], element type of the logits; may be the logits themselves
    int64_t rows;
    int64_t vocabulary;
    int64_t row_stride;
    int64_t grad_row_stride;
    int64_t ignore_index;
    ElementType element_type;
};

}  // namespace entropy_fast
