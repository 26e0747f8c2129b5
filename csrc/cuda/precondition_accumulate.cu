#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"
#include "precondition_accumulate.cuh"
#include "precondition_accumulate.h"

namespace entropy_fast {
namespace cuda {

void precondition_accumulate(const PreconditionAccumulate& call, void* stream) {
    constexpr const char* kOp = "precondition_accumulate";
    if (call.tensors < 0 || call.chunks < 0) throw std::invalid_argument(std::string(kOp) + ": negative size");
    const unsigned chunks = blocks_for(kOp, call.chunks);
    const unsigned tensors = blocks_for(kOp, call.tensors);
    const auto on_stream = static_cast<cudaStream_t>(stream);
    if (chunks > 0) {
        precondition_accumulate_kernel<<<chunks, kThreads, 0, on_stream>>>(call);
        check_launch(kOp);
    }
    if (tensors > 0) {
        sum_partial_dots_kernel<<<tensors, kThreads, 0, on_stream>>>(call);
        check_launch(kOp);
    }
}

}  // namespace cuda
}  // namespace entropy_fast
