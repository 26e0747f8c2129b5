#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../token_logprobs_check.h"
#include "launch.h"
#include "token_logprobs.cuh"
#include "token_logprobs.h"

namespace entropy_fast {
namespace cuda {
namespace {

// `launch` gets a null pointer of the storage type.
template <typename Launch>
void dispatch(ElementType element_type, const Launch& launch) {
    switch (element_type) {
        case ElementType::kFloat32:
            launch(static_cast<float*>(nullptr));
            break;
        case ElementType::kFloat64:
            launch(static_cast<double*>(nullptr));
            break;
        case ElementType::kBFloat16:
            launch(static_cast<__nv_bfloat16*>(nullptr));
            break;
        case ElementType::kFloat16:
            launch(static_cast<__half*>(nullptr));
            break;
    }
    check_launch("token_logprobs");
}

}  // namespace

void token_logprobs_forward(const TokenLogprobsForward& call, void* stream) {
    check_shape(call);
    const unsigned rows = blocks_for("token_logprobs", call.rows);
    if (rows == 0) return;
    dispatch(call.element_type, [&](auto* storage) {
        using Storage = std::remove_pointer_t<decltype(storage)>;
        const auto kernel =
            call.entropy ? token_logprobs_forward_kernel<Storage, true> : token_logprobs_forward_kernel<Storage, false>;
        kernel<<<rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
    });
}

void token_logprobs_backward(const TokenLogprobsBackward& call, void* stream) {
    check_shape(call);
    const unsigned rows = blocks_for("token_logprobs", call.rows);
    if (rows == 0) return;
    dispatch(call.element_type, [&](auto* storage) {
        using Storage = std::remove_pointer_t<decltype(storage)>;
        const auto kernel = call.grad_entropy ? token_logprobs_backward_kernel<Storage, true>
                                              : token_logprobs_backward_kernel<Storage, false>;
        kernel<<<rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
    });
}

int device_count(const char** reason) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess) return count;
    *reason = cudaGetErrorString(status);
    return -1;
}

}  // namespace cuda
}  // namespace entropy_fast
