#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "../token_logprobs_check.h"
#include "token_logprobs.cuh"
#include "token_logprobs.h"

namespace entropy_fast {
namespace cuda {
namespace {

template <typename Call>
void check(const Call& call) {
    check_shape(call);
    if (call.rows > std::numeric_limits<int>::max()) {
        throw std::invalid_argument("token_logprobs: more rows than a grid has blocks (2147483647)");
    }
}

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
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("token_logprobs: the CUDA launch failed: ") + cudaGetErrorString(status));
    }
}

}  // namespace

void token_logprobs_forward(const TokenLogprobsForward& call, void* stream) {
    check(call);
    if (call.rows == 0) return;
    dispatch(call.element_type, [&](auto* storage) {
        using Storage = std::remove_pointer_t<decltype(storage)>;
        token_logprobs_forward_kernel<Storage>
            <<<static_cast<unsigned>(call.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
    });
}

void token_logprobs_backward(const TokenLogprobsBackward& call, void* stream) {
    check(call);
    if (call.rows == 0) return;
    dispatch(call.element_type, [&](auto* storage) {
        using Storage = std::remove_pointer_t<decltype(storage)>;
        token_logprobs_backward_kernel<Storage>
            <<<static_cast<unsigned>(call.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
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
