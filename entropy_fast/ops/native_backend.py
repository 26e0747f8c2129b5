"""Calls into the compiled library, ``entropy_fast._native``: the backends ``native`` (CPU) and ``cuda``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_fast._version import __version__
from entropy_fast.errors import ConfigError, NativeLibraryError
from entropy_fast.ops.accumulation_table import AccumulationTable
from entropy_fast.ops.attention_inputs import AttentionInputs, PrefixSums
from entropy_fast.ops.registration import accumulator, described

if TYPE_CHECKING:
    from entropy_fast import _native

__all__ = [
    "cpu_detail",
    "cpu_reason",
    "cuda_detail",
    "cuda_reason",
    "on_rows",
    "packed_attention_backward",
    "packed_attention_forward",
    "precondition_accumulate",
    "softmax_block",
    "sums_of_blocks",
    "token_logprobs_backward",
    "token_logprobs_forward",
    "unit_products",
]


# More tokens than there are.
_NO_WINDOW = 2**62


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The library, or None and the reason why it cannot be used."""
    try:
        library = importlib.import_module("entropy_fast._native")
    except ImportError as error:
        return None, f"the compiled library entropy_fast._native cannot be imported ({error})"
    built_for = library.build_info()["version"]
    if built_for != __version__:
        return None, f"the compiled library belongs to entropy_fast {built_for}, this is {__version__}"
    return library, ""


def _library() -> ModuleType:
    library, why_not = _load()
    if library is None:
        raise NativeLibraryError(f"{why_not}.", fix="install entropy-fast again: pip install --force-reinstall .")
    return library


def cpu_reason(device_type: str) -> str:
    """Why the CPU kernels cannot run on a device type; empty where they can."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, not on {device_type}"
    library, why_not = _load()
    if library is None:
        return why_not
    try:
        library.selected_variant()
    except RuntimeError as error:
        return str(error)
    return ""


def cuda_reason(device_type: str) -> str:
    """Why the CUDA kernels cannot run on a device type; empty where they can."""
    if device_type != "cuda":
        return f"it runs on CUDA tensors, not on {device_type}"
    library, why_not = _load()
    if library is None:
        return why_not
    info = library.build_info()
    if not info["cuda"]:
        return f"the library has no CUDA kernels: {info['cuda_reason']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    count, why_not = library.cuda_device_count()
    if count < 1:
        return f"no CUDA device can be used ({why_not or 'none was found'})"
    return ""


def cpu_detail() -> str:
    """The instruction set that runs here, whose threads it runs on, and the compiler."""
    info = _library().build_info()
    threads = "OpenMP" if _library().uses_openmp() else "threads of its own"
    return f"{_library().selected_variant()} on {info['architecture']}, {threads}, {info['cxx_compiler']}"


def cuda_detail() -> str:
    """The architectures in the library, and the compiler."""
    info = _library().build_info()
    return f"{info['cuda_architectures']}, {info['cuda_compiler']}"


def _element_type(dtype: torch.dtype) -> _native.ElementType:
    element_type: _native.ElementType = getattr(_library().ElementType, str(dtype).removeprefix("torch."))
    return element_type


def _address(tensor: Tensor | None) -> int:
    """Where the elements are; 0 where there is no tensor, or nothing in it.

    Raises:
        ConfigError: it has elements and no memory of its own: a meta tensor, or a wrapper such as a distributed one.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ConfigError(
            f"a compiled kernel got a {type(tensor).__name__} of {described(tensor)} that has no memory.",
            fix="pass the tensor on this device that it stands for (DTensor: to_local()).",
        )
    return address


def token_logprobs_forward(
    logits: Tensor, targets: Tensor, logprob: Tensor, lse: Tensor, entropy: Tensor | None, ignore_index: int
) -> None:
    """Fill ``logprob``, ``lse`` and ``entropy``. Shapes and dtypes are the caller's business; rows are contiguous."""
    _call(
        "token_logprobs_forward",
        logits.device,
        *map(_address, (logits, targets, logprob, lse, entropy)),
        *logits.shape,
        logits.stride(0),
        ignore_index,
        _element_type(logits.dtype),
    )


def token_logprobs_backward(
    grad_logprob: Tensor,
    grad_lse: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logits: Tensor,
    ignore_index: int,
) -> None:
    """Fill ``grad_logits``, whose rows are contiguous and which may be ``logits``."""
    _call(
        "token_logprobs_backward",
        logits.device,
        *map(_address, (logits, targets, lse, entropy, grad_logprob, grad_lse, grad_entropy, grad_logits)),
        *logits.shape,
        logits.stride(0),
        grad_logits.stride(0),
        ignore_index,
        _element_type(logits.dtype),
    )


def softmax_block(
    logits: Tensor,
    entropy_weights: Tensor | None,
    targets: Tensor,
    state: Tensor,
    *,
    first_token: int,
    softcap: float,
    weights: bool,
) -> None:
    """One block of the vocabulary (csrc/softmax_block.h): update ``state`` and, with ``weights``, overwrite ``logits``."""
    _call(
        "softmax_block",
        logits.device,
        *map(_address, (logits, entropy_weights, targets, state)),
        *logits.shape,
        logits.stride(0),
        first_token,
        softcap,
        weights,
        _element_type(logits.dtype),
    )


def sums_of_blocks(sums: list[Tensor], products: list[Tensor] | None, state: Tensor) -> None:
    """Rescale the sums as the last block asks for, and add its products where they are given (csrc/softmax_block.h)."""
    pairs = [*sums, None][:2], [*(products or ()), None, None][:2]
    dtype = sums[0].dtype if products is None else products[0].dtype
    _call(
        "sums_of_blocks",
        state.device,
        *map(_address, (*pairs[0], *pairs[1], state)),
        *sums[0].shape,
        _element_type(dtype),
    )


def precondition_accumulate(
    table: AccumulationTable, dots: Tensor, x_scale: float, g_scale: float, update: bool
) -> None:
    """Fill ``dots`` and, with ``update``, add to the sums of the table."""
    partial_dots = torch.empty(table.n_chunks, 3, dtype=torch.float64, device=dots.device)
    _call(
        "precondition_accumulate",
        dots.device,
        *map(_address, (table.entries, table.factors, table.owners, partial_dots, dots)),
        table.n_tensors,
        table.n_chunks,
        x_scale,
        g_scale,
        update,
    )


def on_rows(function: str, *tensors: Tensor, parameters: Sequence[float] = ()) -> None:
    """Call one of csrc/frozen_layers.h on contiguous tensors of its struct's order, the first of them [rows, width]."""
    rows, width = tensors[0].shape
    dtype = tensors[0].dtype
    _call(function, tensors[0].device, *map(_address, tensors), rows, width, *parameters, _element_type(dtype))


def unit_products(sums: Sequence[Tensor], narrow: Tensor, wide: Tensor, weights: Tensor, runs: Tensor) -> None:
    """Add to every label's ``sums`` [units, narrow columns, wide columns], of any strides (csrc/unit_products.h).

    Args:
        sums: one or two, in the accumulator's dtype.
        narrow: [tokens, narrow columns], rows of any stride.
        wide: [tokens, wide columns], likewise, in the same dtype.
        weights: [labels, tokens or a divisor of it], contiguous, in the dtype of the sums.
        runs: [n, 3] int64, unit, first token and the one after the last; units ascending.
    """
    first, second = [*sums, None][:2]
    assert first is not None
    _call(
        "unit_products",
        narrow.device,
        *map(_address, (narrow, wide, weights, runs, first, second)),
        len(runs),
        narrow.shape[1],
        wide.shape[1],
        narrow.stride(0),
        wide.stride(0),
        weights.stride(0),
        narrow.shape[0] // weights.shape[1] if len(narrow) else 1,
        *first.stride(),
        _element_type(narrow.dtype),
    )


def packed_attention_forward(inputs: AttentionInputs, output: Tensor) -> None:
    """Fill ``output`` [N, heads, D] (csrc/packed_attention.h)."""
    fields, _alive = _attention_fields(inputs)
    _call("packed_attention_forward", output.device, *fields, _address(output), _element_type(output.dtype))


def packed_attention_backward(
    inputs: AttentionInputs, above: Tensor, sums: PrefixSums | None, gradients: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Fill ``gradients`` of q, k and v, and ``sums`` (csrc/packed_attention.h)."""
    fields, _alive = _attention_fields(inputs)
    above = _with_whole_heads(above)
    runs = inputs.sequences.each if sums is None else inputs.sequences.by_prefix
    weights, key_sums, value_sums = (None, None, None) if sums is None else (sums.weights, sums.key, sums.value)
    _call(
        "packed_attention_backward",
        above.device,
        *fields,
        *_operand(above),
        *map(_address, (runs, weights, *gradients, key_sums, value_sums)),
        len(runs) - 1,
        *((0, 0) if weights is None else weights.shape),
        _element_type(above.dtype),
    )


def _attention_fields(inputs: AttentionInputs) -> tuple[list[object], list[Tensor | None]]:
    """The fields of ``PackedAttention``, and the tensors that they point to."""
    q, sequences, options = inputs.query, inputs.sequences, inputs.options
    given = (q, inputs.key, inputs.value, inputs.prefix_key, inputs.prefix_value)
    operands = [None if t is None else _with_whole_heads(t) for t in given]
    sinks = None if options.sinks is None else options.sinks.to(accumulator(q)).contiguous()
    prefix_tokens = 0 if inputs.prefix_key is None else inputs.prefix_key.shape[1]
    fields: list[object] = [field for operand in operands for field in _operand(operand)]
    fields += [_address(sequences.table), _address(sinks), len(sequences.table), q.shape[1], prefix_tokens]
    window = _NO_WINDOW if options.window is None else min(options.window, _NO_WINDOW)
    return [*fields, len(q), len(inputs.key), q.shape[2], window, options.scale], [*operands, sinks]


def _with_whole_heads(packed: Tensor) -> Tensor:
    """[heads, N, D] whose elements of a head of a token stand next to one another."""
    return packed if packed.stride(2) == 1 else packed.contiguous()


def _operand(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (_address(tensor), tensor.stride(0), tensor.stride(1))


def _call(function: str, device: torch.device, *arguments: object) -> None:
    """Call ``function`` with the fields of its struct, in order, and with the threads or the stream to run on."""
    library = _library()
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                getattr(library, f"{function}_cuda")(*arguments, torch.cuda.current_stream(device).cuda_stream)
        else:
            getattr(library, f"{function}_cpu")(*arguments, torch.get_num_threads())
    except (RuntimeError, ValueError) as error:
        raise NativeLibraryError(
            f"{function} was refused by the compiled library: {error}.",
            fix="check the arguments; if they are right, report this with the output of `entropy-fast doctor`.",
        ) from error
