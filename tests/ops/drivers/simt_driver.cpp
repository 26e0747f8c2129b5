// Runs the CUDA kernels, on host threads, on a call file.
#include "simt_shim.h"

// The shim has to come first: it takes the place of the CUDA headers.
#include "call_file.h"
#include "cuda/precondition_accumulate.cuh"
#include "cuda/token_logprobs.cuh"

namespace {

namespace kernels = entropy_fast::cuda;

template <typename Storage>
void launch(const entropy_fast::TokenLogprobsForward& call) {
    const auto rows = static_cast<unsigned>(call.rows);
    const auto kernel = call.entropy ? kernels::token_logprobs_forward_kernel<Storage, true>
                                     : kernels::token_logprobs_forward_kernel<Storage, false>;
    simt_launch(kernel, rows, kernels::kThreads, call);
}

template <typename Storage>
void launch(const entropy_fast::TokenLogprobsBackward& call) {
    const auto rows = static_cast<unsigned>(call.rows);
    const auto kernel = call.grad_entropy ? kernels::token_logprobs_backward_kernel<Storage, true>
                                          : kernels::token_logprobs_backward_kernel<Storage, false>;
    simt_launch(kernel, rows, kernels::kThreads, call);
}

struct Run {
    template <typename Call>
    void operator()(const Call& call) const {
        switch (call.element_type) {
            case entropy_fast::ElementType::kFloat32:
                return launch<float>(call);
            case entropy_fast::ElementType::kFloat64:
                return launch<double>(call);
            case entropy_fast::ElementType::kBFloat16:
                return launch<__nv_bfloat16>(call);
            case entropy_fast::ElementType::kFloat16:
                return launch<__half>(call);
        }
    }
    void operator()(const entropy_fast::PreconditionAccumulate& call) const {
        const auto chunks = static_cast<unsigned>(call.chunks);
        const auto tensors = static_cast<unsigned>(call.tensors);
        simt_launch(kernels::precondition_accumulate_kernel, chunks, kernels::kThreads, call);
        simt_launch(kernels::sum_partial_dots_kernel, tensors, kernels::kThreads, call);
    }
    // There is no CUDA kernel of these.
    void operator()(const entropy_fast::RmsNormForward&) const { std::abort(); }
    void operator()(const entropy_fast::RmsNormBackward&) const { std::abort(); }
    void operator()(const entropy_fast::GatedSiluForward&) const { std::abort(); }
    void operator()(const entropy_fast::GatedSiluBackward&) const { std::abort(); }
    void operator()(const entropy_fast::UnitProducts&) const { std::abort(); }
    void operator()(const entropy_fast::PackedAttentionForward&) const { std::abort(); }
    void operator()(const entropy_fast::PackedAttentionBackward&) const { std::abort(); }
    void operator()(const entropy_fast::SoftmaxBlock&) const { std::abort(); }
    void operator()(const entropy_fast::SumsOfBlocks&) const { std::abort(); }
};

}  // namespace

int main(int, char** arguments) {
    CallFile file(arguments[1]);
    file.run(Run{});
    file.write(arguments[2]);
}
