// The Python module: addresses, sizes and strides in, nothing out. Shapes, dtypes and devices are checked by the
// caller, entropy_fast.ops, which also keeps the tensors alive until the call returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "build_info.h"
#include "cpu/dispatch.h"
#include "cpu/token_logprobs.h"
#if ENTROPY_FAST_WITH_CUDA
#include "cuda/token_logprobs.h"
#endif

namespace py = pybind11;

namespace entropy_fast {
namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

TokenLogprobsForward forward_call(std::uintptr_t logits, std::uintptr_t targets, std::uintptr_t logprob,
                                  std::uintptr_t lse, int64_t rows, int64_t vocabulary, int64_t row_stride,
                                  int64_t ignore_index, ElementType element_type) {
    return {pointer<const void>(logits),
            pointer<const int64_t>(targets),
            pointer<void>(logprob),
            pointer<double>(lse),
            rows,
            vocabulary,
            row_stride,
            ignore_index,
            element_type};
}

TokenLogprobsBackward backward_call(std::uintptr_t logits, std::uintptr_t targets, std::uintptr_t lse,
                                    std::uintptr_t grad_logprob, std::uintptr_t grad_lse, std::uintptr_t grad_logits,
                                    int64_t rows, int64_t vocabulary, int64_t row_stride, int64_t ignore_index,
                                    ElementType element_type) {
    return {pointer<const void>(logits),
            pointer<const int64_t>(targets),
            pointer<const double>(lse),
            pointer<const void>(grad_logprob),
            pointer<const double>(grad_lse),
            pointer<void>(grad_logits),
            rows,
            vocabulary,
            row_stride,
            ignore_index,
            element_type};
}

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

#if ENTROPY_FAST_WITH_CUDA
void define_cuda(py::module_& module) {
    module.def(
        "token_logprobs_forward_cuda",
        [](std::uintptr_t logits, std::uintptr_t targets, std::uintptr_t logprob, std::uintptr_t lse, int64_t rows,
           int64_t vocabulary, int64_t row_stride, int64_t ignore_index, ElementType element_type,
           std::uintptr_t stream) {
            cuda::token_logprobs_forward(
                forward_call(logits, targets, logprob, lse, rows, vocabulary, row_stride, ignore_index, element_type),
                pointer<void>(stream));
        },
        py::kw_only(), py::arg("logits"), py::arg("targets"), py::arg("logprob"), py::arg("lse"), py::arg("rows"),
        py::arg("vocabulary"), py::arg("row_stride"), py::arg("ignore_index"), py::arg("element_type"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
    module.def(
        "token_logprobs_backward_cuda",
        [](std::uintptr_t logits, std::uintptr_t targets, std::uintptr_t lse, std::uintptr_t grad_logprob,
           std::uintptr_t grad_lse, std::uintptr_t grad_logits, int64_t rows, int64_t vocabulary, int64_t row_stride,
           int64_t ignore_index, ElementType element_type, std::uintptr_t stream) {
            cuda::token_logprobs_backward(backward_call(logits, targets, lse, grad_logprob, grad_lse, grad_logits, rows,
                                                        vocabulary, row_stride, ignore_index, element_type),
                                          pointer<void>(stream));
        },
        py::kw_only(), py::arg("logits"), py::arg("targets"), py::arg("lse"), py::arg("grad_logprob"),
        py::arg("grad_lse"), py::arg("grad_logits"), py::arg("rows"), py::arg("vocabulary"), py::arg("row_stride"),
        py::arg("ignore_index"), py::arg("element_type"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
#endif

py::tuple cuda_device_count() {
#if ENTROPY_FAST_WITH_CUDA
    const char* reason = "";
    const int count = cuda::device_count(&reason);
    return py::make_tuple(count, reason);
#else
    return py::make_tuple(-1, ENTROPY_FAST_CUDA_REASON);
#endif
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

    module.def(
        "token_logprobs_forward_cpu",
        [](std::uintptr_t logits, std::uintptr_t targets, std::uintptr_t logprob, std::uintptr_t lse, int64_t rows,
           int64_t vocabulary, int64_t row_stride, int64_t ignore_index, ElementType element_type, int threads) {
            cpu::token_logprobs_forward(
                forward_call(logits, targets, logprob, lse, rows, vocabulary, row_stride, ignore_index, element_type),
                threads);
        },
        py::kw_only(), py::arg("logits"), py::arg("targets"), py::arg("logprob"), py::arg("lse"), py::arg("rows"),
        py::arg("vocabulary"), py::arg("row_stride"), py::arg("ignore_index"), py::arg("element_type"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    module.def(
        "token_logprobs_backward_cpu",
        [](std::uintptr_t logits, std::uintptr_t targets, std::uintptr_t lse, std::uintptr_t grad_logprob,
           std::uintptr_t grad_lse, std::uintptr_t grad_logits, int64_t rows, int64_t vocabulary, int64_t row_stride,
           int64_t ignore_index, ElementType element_type, int threads) {
            cpu::token_logprobs_backward(backward_call(logits, targets, lse, grad_logprob, grad_lse, grad_logits, rows,
                                                       vocabulary, row_stride, ignore_index, element_type),
                                         threads);
        },
        py::kw_only(), py::arg("logits"), py::arg("targets"), py::arg("lse"), py::arg("grad_logprob"),
        py::arg("grad_lse"), py::arg("grad_logits"), py::arg("rows"), py::arg("vocabulary"), py::arg("row_stride"),
        py::arg("ignore_index"), py::arg("element_type"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

#if ENTROPY_FAST_WITH_CUDA
    define_cuda(module);
#endif
}

}  // namespace entropy_fast
