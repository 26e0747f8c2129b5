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
def uses_openmp() -> bool: ...

class AccumulateKind:
    float32: AccumulateKind
    bfloat16: AccumulateKind
    float16: AccumulateKind
    bfloat16_moments: AccumulateKind
    float64: AccumulateKind

ACCUMULATE_CHUNK: int

# One argument for each field of the struct of that name in csrc/, in its order, then the number of threads.
def token_logprobs_forward_cpu(*fields: object) -> None: ...
def token_logprobs_backward_cpu(*fields: object) -> None: ...
def softmax_block_cpu(*fields: object) -> None: ...
def sums_of_blocks_cpu(*fields: object) -> None: ...
def precondition_accumulate_cpu(*fields: object) -> None: ...
def unit_products_cpu(*fields: object) -> None: ...

# The same, then the address of a stream. These exist only where build_info()["cuda"] is true.
def token_logprobs_forward_cuda(*fields: object) -> None: ...
def token_logprobs_backward_cuda(*fields: object) -> None: ...
def precondition_accumulate_cuda(*fields: object) -> None: ...
