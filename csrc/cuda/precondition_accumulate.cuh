// The kernels of precondition_accumulate: one block per chunk, then one block per tensor for the sum of its chunks'
// dots. ../precondition_accumulate.h has the mathematics.
//
// Dots are products and sums of doubles. Which thread adds what, and in which order, depends on the number of elements
// of the tensor alone, and there are no atomic additions: two runs give the same bits.
#pragma once

#include "../precondition_accumulate.h"
#include "block.cuh"
#include "packs.cuh"

namespace entropy_fast {
namespace cuda {

// Elements that a thread moves at once: 16 bytes of a float.
constexpr int kAccumulatePack = 4;

struct Dots {
    double x_y = 0.0;
    double x_sum_y = 0.0;
    double y_sum_x = 0.0;
};

// The sum over the block, written to to[0..2].
__device__ inline void store_sum_over_block(const Dots& own, double* to) {
    __shared__ double warp_dots[kWarps][3];
    const double sums[3] = {sum_over_warp(own.x_y), sum_over_warp(own.x_sum_y), sum_over_warp(own.y_sum_x)};
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int k = 0; k < 3; ++k) warp_dots[threadIdx.x / kWarp][k] = sums[k];
    }
    __syncthreads();
    if (threadIdx.x >= 3) return;
    double sum = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_dots[warp][threadIdx.x];
    to[threadIdx.x] = sum;
}

template <typename Scalar>
__device__ inline Scalar preconditioned(Scalar g, Scalar v, Scalar bias_correction, Scalar eps, Scalar ratio) {
    const Scalar root = sqrt(v * bias_correction);
    // A scale of 0, not a y of 0: a gradient that is not finite stays visible.
    return g * (root == Scalar(0) ? Scalar(0) : ratio / (root + eps));
}

// Gradient and Moment say how x and g, and v, are stored; Scalar is the type of the sums and of everything computed.
template <typename Gradient, typename Moment, typename Scalar>
__device__ inline Dots accumulate_chunk(const PreconditionAccumulate& call, const AccumulateEntry& entry,
                                        const AccumulateFactors& factors, int64_t begin, int64_t end) {
    constexpr int kCount = kAccumulatePack;
    const auto* x_from = reinterpret_cast<const Gradient*>(entry.x);
    const auto* g_from = reinterpret_cast<const Gradient*>(entry.g);
    const auto* v_from = reinterpret_cast<const Moment*>(entry.v);
    auto* x_sum = reinterpret_cast<Scalar*>(entry.x_sum);
    auto* y_sum = reinterpret_cast<Scalar*>(entry.y_sum);
    // A chunk begins at a multiple of every pack's size.
    const bool aligned = is_aligned<kCount>(x_from) && is_aligned<kCount>(g_from) && is_aligned<kCount>(v_from) &&
                         is_aligned<kCount>(x_sum) && is_aligned<kCount>(y_sum);
    const Scalar x_scale = Scalar(call.x_scale);
    const Scalar ratio = Scalar(factors.ratio * call.g_scale);
    const Scalar bias_correction = Scalar(factors.bias_correction);
    const Scalar eps = Scalar(factors.eps);
    Dots dots;
    for (int64_t i = begin + int64_t(threadIdx.x) * kCount; i < end; i += int64_t(kThreads) * kCount) {
        const int64_t count = end - i;
        const bool whole = aligned && count >= kCount;
        Scalar x[kCount], g[kCount], v[kCount], before_x[kCount], before_y[kCount];
        load_pack(x_from + i, whole, count, Scalar(0), x);
        load_pack(x_sum + i, whole, count, Scalar(0), before_x);
        load_pack(y_sum + i, whole, count, Scalar(0), before_y);
        if (v_from) {
            load_pack(g_from + i, whole, count, Scalar(0), g);
            load_pack(v_from + i, whole, count, Scalar(0), v);
        }
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            x[k] *= x_scale;
            const Scalar y = v_from ? preconditioned(g[k], v[k], bias_correction, eps, ratio) : Scalar(0);
            dots.x_y += double(x[k]) * double(y);
            dots.x_sum_y += double(x[k]) * double(before_y[k]);
            dots.y_sum_x += double(y) * double(before_x[k]);
            before_x[k] += x[k];
            before_y[k] += y;
        }
        if (call.update) {
            store_pack(x_sum + i, whole, count, before_x);
            store_pack(y_sum + i, whole, count, before_y);
        }
    }
    return dots;
}

__global__ void __launch_bounds__(kThreads) precondition_accumulate_kernel(PreconditionAccumulate call) {
    const int64_t index = blockIdx.x;
    const int64_t tensor = call.owners[index];
    const AccumulateEntry entry = call.entries[tensor];
    const AccumulateFactors factors = call.factors[tensor];
    const int64_t begin = (index - entry.first_chunk) * kAccumulateChunk;
    const int64_t end = begin + kAccumulateChunk < entry.numel ? begin + kAccumulateChunk : entry.numel;
    Dots dots;
    switch (entry.kind) {
        case AccumulateKind::kFloat32:
            dots = accumulate_chunk<float, float, float>(call, entry, factors, begin, end);
            break;
        case AccumulateKind::kBFloat16:
            dots = accumulate_chunk<__nv_bfloat16, float, float>(call, entry, factors, begin, end);
            break;
        case AccumulateKind::kFloat16:
            dots = accumulate_chunk<__half, float, float>(call, entry, factors, begin, end);
            break;
        case AccumulateKind::kBFloat16Moments:
            dots = accumulate_chunk<__nv_bfloat16, __nv_bfloat16, float>(call, entry, factors, begin, end);
            break;
        case AccumulateKind::kFloat64:
            dots = accumulate_chunk<double, double, double>(call, entry, factors, begin, end);
            break;
    }
    store_sum_over_block(dots, call.partial_dots + 3 * index);
}

// Thread t adds up chunks t, t + kThreads, ... of its block's tensor.
__global__ void __launch_bounds__(kThreads) sum_partial_dots_kernel(PreconditionAccumulate call) {
    const int64_t tensor = blockIdx.x;
    const int64_t begin = call.entries[tensor].first_chunk;
    const int64_t end = tensor + 1 < call.tensors ? call.entries[tensor + 1].first_chunk : call.chunks;
    Dots dots;
    for (int64_t chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) {
        const double* partial = call.partial_dots + 3 * chunk;
        dots.x_y += partial[0];
        dots.x_sum_y += partial[1];
        dots.y_sum_x += partial[2];
    }
    store_sum_over_block(dots, call.dots + 3 * tensor);
}

}  // namespace cuda
}  // namespace entropy_fast
