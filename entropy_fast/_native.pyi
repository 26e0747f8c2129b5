"""The compiled kernels, called by address. Only :mod:`entropy_fast.ops` uses them."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    cxx_compiler: str
    architecture: str
    cpu_variants: list[str]
    cuda: bool
    cuda_request: str
    cuda_reason: str
    cuda_compiler: str
    cuda_architectures: str

class ElementType:
    float32: ElementType
    float64: ElementType
    bfloat16: ElementType
    float16: ElementType

def build_info() -> BuildInfo: ...
def supported_variants() -> list[str]: ...
def selected_variant() -> str: ...
def cuda_device_count() -> tuple[int, str]: ...
def token_logprobs_forward_cpu(
    *,
    logits: int,
    targets: int,
    logprob: int,
    lse: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    ignore_index: int,
    element_type: ElementType,
    threads: int,
) -> None: ...
def token_logprobs_backward_cpu(
    *,
    logits: int,
    targets: int,
    lse: int,
    grad_logprob: int,
    grad_lse: int,
    grad_logits: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    ignore_index: int,
    element_type: ElementType,
    threads: int,
) -> None: ...

# The following two exist only where build_info()["cuda"] is true.
def token_logprobs_forward_cuda(
    *,
    logits: int,
    targets: int,
    logprob: int,
    lse: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    ignore_index: int,
    element_type: ElementType,
    stream: int,
) -> None: ...
def token_logprobs_backward_cuda(
    *,
    logits: int,
    targets: int,
    lse: int,
    grad_logprob: int,
    grad_lse: int,
    grad_logits: int,
    rows: int,
    vocabulary: int,
    row_stride: int,
    ignore_index: int,
    element_type: ElementType,
    stream: int,
) -> None: ...
