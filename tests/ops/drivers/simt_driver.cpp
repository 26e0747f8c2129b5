// Runs the CUDA kernels of token_logprobs, on host threads, on a call file.
#include "simt_shim.h"

// The shim has to come first: it takes the place of the CUDA headers.
#include "call_file.h"
#include "cuda/token_logprobs.cuh"

namespace kernels = entropy_fast::cuda;

template <typename Storage>
void run(CallFile& call) {
    const auto rows = static_cast<unsigned>(call.rows);
    simt_launch(kernels::token_logprobs_forward_kernel<Storage>, rows, kernels::kThreads, call.forward());
    simt_launch(kernels::token_logprobs_backward_kernel<Storage>, rows, kernels::kThreads, call.backward());
}

int main(int, char** arguments) {
    CallFile call = read_call(arguments[1]);
    switch (call.type()) {
        case entropy_fast::ElementType::kFloat32:
            run<float>(call);
            break;
        case entropy_fast::ElementType::kFloat64:
            run<double>(call);
            break;
        case entropy_fast::ElementType::kBFloat16:
            run<__nv_bfloat16>(call);
            break;
        case entropy_fast::ElementType::kFloat16:
            run<__half>(call);
            break;
    }
    write_results(call, arguments[2]);
}
