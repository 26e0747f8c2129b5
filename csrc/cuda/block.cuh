// The shape of a block, the same for every kernel, and sums over its warps.
#pragma once

namespace entropy_fast {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Every lane ends with the same bits: lanes differ in the order of the two operands of each addition only.
__device__ inline double sum_over_warp(double own) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) own += __shfl_xor_sync(0xffffffffu, own, offset);
    return own;
}

template <typename Scalar>
__device__ inline Scalar maximum_over_warp(Scalar own) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const Scalar other = __shfl_xor_sync(0xffffffffu, own, offset);
        own = other > own ? other : own;
    }
    return own;
}

}  // namespace cuda
}  // namespace entropy_fast
