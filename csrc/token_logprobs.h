// Log-probabilities of chosen tokens: what the host hands to the kernels of either device.
//
// With x = logits[row], t = targets[row]:
//     lse     = log(sum_v exp(x_v))
//     logprob = x_t - lse
//     d logits_v = d_logprob ([v = t] - p_v) + d_lse p_v,   p_v = exp(x_v - lse)
//
// A row whose target is `ignore_index` is not read; its logprob, lse and gradient are 0.
// lse is always double: in float, exp(x - lse) at logits near 1e4 would carry a relative error of 5e-4.
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace entropy_fast {

// `Scalar` (float, or double for double logits) is the type of logprob and of its gradient.
struct TokenLogprobsForward {
    const void* logits;  // [rows, vocabulary], rows `row_stride` elements apart
    const int64_t* targets;
    void* logprob;  // [rows] of Scalar
    double* lse;    // [rows]
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
    const void* grad_logprob;  // [rows] of Scalar
    const double* grad_lse;    // [rows]
    void* grad_logits;         // [rows, vocabulary], contiguous, element type of the logits
    int64_t rows;
    int64_t vocabulary;
    int64_t row_stride;
    int64_t ignore_index;
    ElementType element_type;
};

}  // namespace entropy_fast
