// How each element type is stored, and in which type it is computed with. The including source provides the CUDA
// built-ins: cuda_fp16.h and cuda_bf16.h, or a stand-in that runs the kernels on the host.
#pragma once

namespace entropy_fast {
namespace cuda {

template <typename Storage>
struct Element {
    using Scalar = float;
};

template <>
struct Element<double> {
    using Scalar = double;
};

__device__ inline float to_scalar(float value) { return value; }
__device__ inline double to_scalar(double value) { return value; }
__device__ inline float to_scalar(__half value) { return __half2float(value); }
__device__ inline float to_scalar(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store_scalar(float* to, float value) { *to = value; }
__device__ inline void store_scalar(double* to, double value) { *to = value; }
__device__ inline void store_scalar(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store_scalar(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

}  // namespace cuda
}  // namespace entropy_fast
