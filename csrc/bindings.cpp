// The Python module: addresses, sizes and strides in, nothing out. Shapes, dtypes and devices are checked by the
// caller, entropy_fast.ops, which also keeps the tensors alive until the call returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <type_traits>

#include "build_info.h"
#include "calls.h"
#include "cpu/dispatch.h"
#include "cpu/frozen_layers.h"
#include "cpu/packed_attention.h"
#include "cpu/parallel.h"
#include "cpu/precondition_accumulate.h"
#include "cpu/softmax_block.h"
#include "cpu/token_logprobs.h"
#include "cpu/unit_products.h"
#if ENTROPY_FAST_WITH_CUDA
#include "cuda/precondition_accumulate.h"
#include "cuda/token_logprobs.h"
#endif

namespace py = pybind11;

namespace entropy_fast {
namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = ENTROPY_FAST_VERSION;
    info["cxx_compiler"] = ENTROPY_FAST_CXX_COMPILER;
    info["architecture"] = ENTROPY_FAST_ARCHITECTURE;
    info["cpu_variants"] = cpu::compiled_variants();
    info["cuda"] = bool(ENTROPY_FAST_WITH_CUDA);
    info["cuda_request"] = ENTROPY_FAST_CUDA_REQUEST;
    info["cuda_reason"] = ENTROPY_FAST_CUDA_REASON;
    info["cuda_compiler"] = ENTROPY_FAST_CUDA_COMPILER;
    info["cuda_architectures"] = ENTROPY_FAST_CUDA_ARCHITECTURES;
    return info;
}

py::tuple cuda_device_count() {
#if ENTROPY_FAST_WITH_CUDA
    const char* reason = "";
    const int count = cuda::device_count(&reason);
    return py::make_tuple(count, reason);
#else
    return py::make_tuple(-1, ENTROPY_FAST_CUDA_REASON);
#endif
}

// A number of threads stays one; a stream comes as its address.
template <typename Where>
using WhereArgument = std::conditional_t<std::is_pointer_v<Where>, std::uintptr_t, Where>;

template <typename Where>
Where where_to_run(WhereArgument<Where> where) {
    if constexpr (std::is_pointer_v<Where>) {
        return reinterpret_cast<Where>(where);
    } else {
        return where;
    }
}

// Calls take one argument for each field of their struct, in the struct's order, and one more for where to run.
template <typename Call, typename... Fields, typename Where>
void define(py::module_& module, const char* name, Call (*make)(Fields...), void (*run)(const Call&, Where)) {
    module.def(
        name,
        [make, run](Fields... fields, WhereArgument<Where> where) { run(make(fields...), where_to_run<Where>(where)); },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The compiled kernels of entropy_fast, called by address. Use entropy_fast.ops instead.";

    py::enum_<ElementType>(module, "ElementType")
        .value("float32", ElementType::kFloat32)
        .value("float64", ElementType::kFloat64)
        .value("bfloat16", ElementType::kBFloat16)
        .value("float16", ElementType::kFloat16);

    module.def("build_info", build_info);
    module.def("supported_variants", cpu::supported_variants);
    module.def("selected_variant", cpu::selected_variant);
    module.def("cuda_device_count", cuda_device_count);
    module.def("uses_openmp", cpu::uses_openmp);

    py::enum_<AccumulateKind>(module, "AccumulateKind")
        .value("float32", AccumulateKind::kFloat32)
        .value("bfloat16", AccumulateKind::kBFloat16)
        .value("float16", AccumulateKind::kFloat16)
        .value("bfloat16_moments", AccumulateKind::kBFloat16Moments)
        .value("float64", AccumulateKind::kFloat64);
    module.attr("ACCUMULATE_CHUNK") = kAccumulateChunk;

    define(module, "token_logprobs_forward_cpu", token_logprobs_forward_call, cpu::token_logprobs_forward);
    define(module, "token_logprobs_backward_cpu", token_logprobs_backward_call, cpu::token_logprobs_backward);
    define(module, "softmax_block_cpu", softmax_block_call, cpu::softmax_block);
    define(module, "sums_of_blocks_cpu", sums_of_blocks_call, cpu::sums_of_blocks);
    define(module, "precondition_accumulate_cpu", precondition_accumulate_call, cpu::precondition_accumulate);
    define(module, "rms_norm_forward_cpu", rms_norm_forward_call, cpu::rms_norm_forward);
    define(module, "rms_norm_backward_cpu", rms_norm_backward_call, cpu::rms_norm_backward);
    define(module, "gated_silu_forward_cpu", gated_silu_forward_call, cpu::gated_silu_forward);
    define(module, "gated_silu_backward_cpu", gated_silu_backward_call, cpu::gated_silu_backward);
    define(module, "unit_products_cpu", unit_products_call, cpu::unit_products);
    define(module, "packed_attention_forward_cpu", packed_attention_forward_call, cpu::packed_attention_forward);
    define(module, "packed_attention_backward_cpu", packed_attention_backward_call, cpu::packed_attention_backward);
#if ENTROPY_FAST_WITH_CUDA
    // The last argument of these is a stream, of those above the number of threads.
    define(module, "token_logprobs_forward_cuda", token_logprobs_forward_call, cuda::token_logprobs_forward);
    define(module, "token_logprobs_backward_cuda", token_logprobs_backward_call, cuda::token_logprobs_backward);
    define(module, "precondition_accumulate_cuda", precondition_accumulate_call, cuda::precondition_accumulate);
#endif
}

}  // namespace entropy_fast
