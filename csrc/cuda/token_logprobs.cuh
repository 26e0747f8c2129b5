// The kernels of token_logprobs: one block per row. ../token_logprobs.h has the mathematics.
#pragma once

#include "../token_logprobs.h"
#include "elements.cuh"

namespace entropy_fast {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;

// A running maximum, and the sum of exp(x - maximum). At the start, -inf and 0: the factor exp(-inf) keeps the 0.
template <typename Scalar>
struct MaxSum {
    Scalar highest;
    Scalar sum;
};

// What is subtracted before the exponential: an infinite maximum would make inf - inf of an ordinary value.
template <typename Scalar>
__device__ inline Scalar shift_of(Scalar highest) {
    return isinf(highest) ? Scalar(0) : highest;
}

template <typename Scalar>
__device__ inline MaxSum<Scalar> merged(MaxSum<Scalar> a, MaxSum<Scalar> b) {
    const Scalar highest = a.highest > b.highest ? a.highest : b.highest;
    const Scalar shift = shift_of(highest);
    return {highest, a.sum * exp(a.highest - shift) + b.sum * exp(b.highest - shift)};
}

// Every lane ends with the same bits: lanes differ in the order of the operands only, and `merged` is symmetric.
template <typename Scalar>
__device__ inline MaxSum<Scalar> merged_over_warp(MaxSum<Scalar> own) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const MaxSum<Scalar> other = {__shfl_xor_sync(0xffffffffu, own.highest, offset),
                                      __shfl_xor_sync(0xffffffffu, own.sum, offset)};
        own = merged(own, other);
    }
    return own;
}

template <typename Storage>
__device__ inline MaxSum<typename Element<Storage>::Scalar> merged_over_row(const Storage* x, int64_t vocabulary) {
    using Scalar = typename Element<Storage>::Scalar;
    MaxSum<Scalar> own = {-Scalar(INFINITY), Scalar(0)};
    for (int64_t begin = threadIdx.x; begin < vocabulary; begin += int64_t(kThreads) * kUnroll) {
        Scalar values[kUnroll];
        Scalar highest = own.highest;
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            const int64_t v = begin + int64_t(k) * kThreads;
            values[k] = v < vocabulary ? to_scalar(x[v]) : -Scalar(INFINITY);
            highest = values[k] > highest ? values[k] : highest;
        }
        const Scalar shift = shift_of(highest);
        own.sum *= exp(own.highest - shift);
        own.highest = highest;
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) own.sum += exp(values[k] - shift);
    }
    return own;
}

template <typename Storage>
__global__ void __launch_bounds__(kThreads) token_logprobs_forward_kernel(TokenLogprobsForward call) {
    using Scalar = typename Element<Storage>::Scalar;
    __shared__ Scalar warp_highest[kWarps];
    __shared__ Scalar warp_sum[kWarps];
    const int64_t row = blockIdx.x;
    const int64_t target = call.targets[row];
    Scalar* logprob = static_cast<Scalar*>(call.logprob) + row;
    double* lse = call.lse + row;
    const bool ignored = target == call.ignore_index;
    if (ignored || target < 0 || target >= call.vocabulary) {
        // The same for all threads of the block, so nobody is left waiting at the barrier below.
        if (threadIdx.x == 0) {
            *logprob = ignored ? Scalar(0) : Scalar(NAN);
            *lse = ignored ? 0.0 : double(NAN);
        }
        return;
    }
    const Storage* x = static_cast<const Storage*>(call.logits) + row * call.row_stride;
    MaxSum<Scalar> own = merged_over_warp(merged_over_row(x, call.vocabulary));
    if (threadIdx.x % kWarp == 0) {
        warp_highest[threadIdx.x / kWarp] = own.highest;
        warp_sum[threadIdx.x / kWarp] = own.sum;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) own = merged(own, MaxSum<Scalar>{warp_highest[warp], warp_sum[warp]});
    const double highest = double(own.highest);
    if (isnan(own.sum) || isinf(highest)) {
        *lse = isnan(own.sum) ? double(NAN) : highest;
        *logprob = Scalar(NAN);
    } else {
        const double log_sum = log(double(own.sum));
        *lse = highest + log_sum;
        *logprob = Scalar((double(to_scalar(x[target])) - highest) - log_sum);
    }
}

template <typename Storage>
__global__ void __launch_bounds__(kThreads) token_logprobs_backward_kernel(TokenLogprobsBackward call) {
    using Scalar = typename Element<Storage>::Scalar;
    const int64_t row = blockIdx.x;
    const int64_t target = call.targets[row];
    Storage* grad = static_cast<Storage*>(call.grad_logits) + row * call.vocabulary;
    const bool ignored = target == call.ignore_index;
    if (ignored || target < 0 || target >= call.vocabulary) {
        const Scalar fill = ignored ? Scalar(0) : Scalar(NAN);
        for (int64_t v = threadIdx.x; v < call.vocabulary; v += kThreads) store_scalar(grad + v, fill);
        return;
    }
    const Storage* x = static_cast<const Storage*>(call.logits) + row * call.row_stride;
    // x - lse in two steps, so that a float loses nothing of a double lse. Where lse is not finite, `low` is NaN.
    const double lse = call.lse[row];
    const Scalar high = Scalar(lse);
    const Scalar low = Scalar(lse - double(high));
    const double grad_logprob = double(static_cast<const Scalar*>(call.grad_logprob)[row]);
    const double grad_lse = call.grad_lse[row];
    const Scalar scale = Scalar(grad_lse - grad_logprob);
    for (int64_t v = threadIdx.x; v < call.vocabulary; v += kThreads) {
        if (v == target) continue;
        store_scalar(grad + v, scale * exp((to_scalar(x[v]) - high) - low));
    }
    if (threadIdx.x == 0) {
        // 1 - p of a likely token would cancel.
        const double logprob = (double(to_scalar(x[target])) - double(high)) - double(low);
        store_scalar(grad + target, Scalar(grad_lse * exp(logprob) - grad_logprob * expm1(logprob)));
    }
}

}  // namespace cuda
}  // namespace entropy_fast
