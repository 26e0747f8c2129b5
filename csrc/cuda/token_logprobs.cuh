// The kernels of token_logprobs: one block per row. ../token_logprobs.h has the mathematics.
//
// Forward. Threads, then warps, then the block keep a running maximum m with s = sum exp(x - m) and
// w = sum exp(x - m) (x - m), from which lse = m + log s and entropy = log s - w / s. When m rises to m',
//     w <- (w + (m - m') s) exp(m - m'),   s <- s exp(m - m')
// Which thread adds what, and in which order, depends on the vocabulary's size alone.
//
// Backward. An element is read and written by one thread only, the target included, so that the gradient may take the
// logits' place without a barrier.
#pragma once

#include "../token_logprobs.h"
#include "block.cuh"
#include "packs.cuh"

namespace entropy_fast {
namespace cuda {

// Packs that a thread loads before it uses the first of them. Exponentials of doubles take many registers.
template <typename Storage>
constexpr int kPacks = sizeof(Storage) < 8 ? 2 : 1;

// Below this exp is less than the smallest normal number. In a product with a probability of 0 it stands in for -inf.
__device__ inline float no_less_than_floor(float x) { return fmax(x, -0x1.5d589ep6f); }
__device__ inline double no_less_than_floor(double x) { return fmax(x, -0x1.6232bdd7abcd2p9); }

// At the start -inf, 0, 0. A NaN does not show in the maximum, but does in `sum`; `weighted` is of no use then.
template <typename Scalar, typename Sum>
struct Softmax {
    Scalar highest;
    Sum sum;
    Sum weighted;
};

template <bool kEntropy, typename Scalar, typename Sum>
__device__ inline void raise(Softmax<Scalar, Sum>& own, Scalar highest) {
    // Two equal infinities would differ by NaN. What was -inf so far has sums of 0, or NaN, and keeps them.
    const Sum lowered = own.highest == highest ? Sum(0) : Sum(own.highest) - Sum(highest);
    const Sum factor = exp(lowered);
    if (kEntropy) own.weighted = (lowered > -Sum(INFINITY) ? own.weighted + lowered * own.sum : own.weighted) * factor;
    own.sum *= factor;
    own.highest = highest;
}

template <bool kEntropy, typename Storage>
__device__ inline Softmax<typename Element<Storage>::Scalar, typename Element<Storage>::Scalar> softmax_of_thread(
    const Storage* x, int64_t vocabulary) {
    using Scalar = typename Element<Storage>::Scalar;
    constexpr int kCount = kPackSize<Storage>;
    constexpr int64_t kStride = int64_t(kThreads) * kCount;
    const bool aligned = is_aligned<kCount>(x);
    Softmax<Scalar, Scalar> own = {-Scalar(INFINITY), Scalar(0), Scalar(0)};
    for (int64_t first = int64_t(threadIdx.x) * kCount; first < vocabulary; first += kPacks<Storage> * kStride) {
        Scalar values[kPacks<Storage>][kCount];
        const bool whole = aligned && first + (kPacks<Storage> - 1) * kStride + kCount <= vocabulary;
#pragma unroll
        for (int k = 0; k < kPacks<Storage>; ++k) {
            const int64_t begin = first + k * kStride;
            load_pack(x + begin, whole, vocabulary - begin, -Scalar(INFINITY), values[k]);
        }
        Scalar highest = own.highest;
#pragma unroll
        for (int k = 0; k < kPacks<Storage>; ++k) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) highest = fmax(highest, values[k][i]);
        }
        if (highest > own.highest) raise<kEntropy>(own, highest);
        // An infinite maximum would make inf - inf of an ordinary value.
        const Scalar shift = isinf(highest) ? Scalar(0) : highest;
        Scalar sum = Scalar(0);
        Scalar weighted = Scalar(0);
#pragma unroll
        for (int k = 0; k < kPacks<Storage>; ++k) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const Scalar difference = values[k][i] - shift;
                const Scalar term = exp(difference);
                sum += term;
                if (kEntropy) weighted += term * no_less_than_floor(difference);
            }
        }
        own.sum += sum;
        if (kEntropy) own.weighted += weighted;
    }
    return own;
}

template <typename Storage, bool kEntropy>
__global__ void __launch_bounds__(kThreads) token_logprobs_forward_kernel(TokenLogprobsForward call) {
    using Scalar = typename Element<Storage>::Scalar;
    __shared__ Scalar warp_highest[kWarps];
    __shared__ double warp_sum[kWarps];
    __shared__ double warp_weighted[kWarps];
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
            if (kEntropy) call.entropy[row] = *lse;
        }
        return;
    }
    const Storage* x = static_cast<const Storage*>(call.logits) + row * call.row_stride;
    const auto of_thread = softmax_of_thread<kEntropy>(x, call.vocabulary);
    Softmax<Scalar, double> own = {of_thread.highest, double(of_thread.sum), double(of_thread.weighted)};
    raise<kEntropy>(own, maximum_over_warp(own.highest));
    own.sum = sum_over_warp(own.sum);
    if (kEntropy) own.weighted = sum_over_warp(own.weighted);
    if (threadIdx.x % kWarp == 0) {
        warp_highest[threadIdx.x / kWarp] = own.highest;
        warp_sum[threadIdx.x / kWarp] = own.sum;
        if (kEntropy) warp_weighted[threadIdx.x / kWarp] = own.weighted;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) {
        Softmax<Scalar, double> other = {warp_highest[warp], warp_sum[warp], kEntropy ? warp_weighted[warp] : 0.0};
        const Scalar highest = fmax(own.highest, other.highest);
        raise<kEntropy>(own, highest);
        raise<kEntropy>(other, highest);
        own.sum += other.sum;
        own.weighted += other.weighted;
    }
    const double highest = double(own.highest);
    double entropy = double(NAN);
    if (isnan(own.sum) || isinf(highest)) {
        *lse = isnan(own.sum) ? double(NAN) : highest;
        *logprob = Scalar(NAN);
    } else {
        const double log_sum = log(own.sum);
        *lse = highest + log_sum;
        *logprob = Scalar((double(to_scalar(x[target])) - highest) - log_sum);
        entropy = log_sum - own.weighted / own.sum;
    }
    if (kEntropy) call.entropy[row] = entropy;
}

// The gradient of one row, element by element.
template <bool kEntropy, typename Scalar>
struct RowGradient {
    // lse in two parts, so that x - lse of a float x loses nothing of it. Where lse is not finite, `low` is NaN.
    Scalar high;
    Scalar low;
    Scalar scale;
    Scalar of_entropy = Scalar(0);
    Scalar entropy = Scalar(0);

    __device__ RowGradient(const TokenLogprobsBackward& call, int64_t row)
        : high(Scalar(call.lse[row])),
          low(Scalar(call.lse[row] - double(high))),
          scale(Scalar(call.grad_lse[row] - double(static_cast<const Scalar*>(call.grad_logprob)[row]))) {
        if (kEntropy) {
            of_entropy = Scalar(call.grad_entropy[row]);
            entropy = Scalar(call.entropy[row]);
        }
    }

    __device__ Scalar elsewhere(Scalar x) const {
        const Scalar difference = (x - high) - low;
        const Scalar p = exp(difference);
        return kEntropy ? p * (scale - of_entropy * (no_less_than_floor(difference) + entropy)) : scale * p;
    }

    // In double, and with expm1: 1 - p of a likely token would cancel.
    __device__ Scalar at_target(Scalar x, const TokenLogprobsBackward& call, int64_t row) const {
        const double grad_logprob = double(static_cast<const Scalar*>(call.grad_logprob)[row]);
        const double logprob = (double(x) - double(high)) - double(low);
        const double p = exp(logprob);
        double gradient = call.grad_lse[row] * p - grad_logprob * expm1(logprob);
        if (kEntropy && p > 0.0) gradient -= call.grad_entropy[row] * p * (logprob + call.entropy[row]);
        return Scalar(gradient);
    }
};

template <typename Storage, bool kEntropy>
__global__ void __launch_bounds__(kThreads) token_logprobs_backward_kernel(TokenLogprobsBackward call) {
    using Scalar = typename Element<Storage>::Scalar;
    constexpr int kCount = kPackSize<Storage>;
    constexpr int64_t kStride = int64_t(kThreads) * kCount;
    const int64_t row = blockIdx.x;
    const int64_t target = call.targets[row];
    const Storage* x = static_cast<const Storage*>(call.logits) + row * call.row_stride;
    Storage* grad = static_cast<Storage*>(call.grad_logits) + row * call.grad_row_stride;
    const bool load_aligned = is_aligned<kCount>(x);
    const bool store_aligned = is_aligned<kCount>(grad);
    const bool ignored = target == call.ignore_index;
    if (ignored || target < 0 || target >= call.vocabulary) {
        Scalar fill[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) fill[i] = ignored ? Scalar(0) : Scalar(NAN);
        for (int64_t begin = int64_t(threadIdx.x) * kCount; begin < call.vocabulary; begin += kStride) {
            const int64_t count = call.vocabulary - begin;
            store_pack(grad + begin, store_aligned && count >= kCount, count, fill);
        }
        return;
    }
    const RowGradient<kEntropy, Scalar> gradient(call, row);
    // The thread whose pack holds the target reads it before its first store, and writes its gradient after its last.
    const bool owns_target = target / kCount % kThreads == threadIdx.x;
    const Scalar at_target = owns_target ? gradient.at_target(to_scalar(x[target]), call, row) : Scalar(0);
    for (int64_t first = int64_t(threadIdx.x) * kCount; first < call.vocabulary; first += kPacks<Storage> * kStride) {
        Scalar values[kPacks<Storage>][kCount];
        const bool whole = first + (kPacks<Storage> - 1) * kStride + kCount <= call.vocabulary;
#pragma unroll
        for (int k = 0; k < kPacks<Storage>; ++k) {
            const int64_t begin = first + k * kStride;
            load_pack(x + begin, whole && load_aligned, call.vocabulary - begin, -Scalar(INFINITY), values[k]);
        }
#pragma unroll
        for (int k = 0; k < kPacks<Storage>; ++k) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) values[k][i] = gradient.elsewhere(values[k][i]);
            const int64_t begin = first + k * kStride;
            store_pack(grad + begin, whole && store_aligned, call.vocabulary - begin, values[k]);
        }
    }
    if (owns_target) store_scalar(grad + target, at_target);
}

}  // namespace cuda
}  // namespace entropy_fast
