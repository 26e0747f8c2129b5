"""Launches of the kernels in :mod:`entropy_fast.kernels`: the backend ``triton``."""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from entropy_fast.ops.accumulation_table import AccumulationTable
from entropy_fast.reference import LinearTokenLogprobs

__all__ = [
    "detail",
    "linear_token_logprobs",
    "precondition_accumulate",
    "reason",
    "token_logprobs_backward",
    "token_logprobs_forward",
]


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The kernels of token_logprobs, or None and the reason why they cannot be used."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    try:
        return importlib.import_module("entropy_fast.kernels.token_logprobs"), ""
    except ImportError as error:
        return None, f"entropy_fast.kernels cannot be imported ({error})"


def _interpreting() -> bool:
    triton = importlib.import_module("triton")
    return bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


def reason(device_type: str) -> str:
    """Why Triton kernels cannot run on a device type; empty where they can."""
    kernels, why_not = _load()
    if kernels is None:
        return why_not
    if device_type == "cuda":
        return "" if torch.cuda.is_available() else "torch sees no CUDA device"
    if device_type == "cpu":
        return "" if _interpreting() else "it runs on CUDA tensors (on CPU tensors only with TRITON_INTERPRET=1)"
    return f"it runs on CUDA tensors, not on {device_type}"


def detail() -> str:
    """Triton's version."""
    return f"triton {importlib.import_module('triton').__version__}"


def _kernels() -> ModuleType:
    kernels, why_not = _load()
    if kernels is None:
        raise ImportError(why_not)
    return kernels


def _accumulator(dtype: torch.dtype) -> object:
    language = importlib.import_module("triton.language")
    return language.float64 if dtype == torch.float64 else language.float32


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def token_logprobs_forward(
    logits: Tensor, targets: Tensor, logprob: Tensor, lse: Tensor, entropy: Tensor | None, ignore_index: int
) -> None:
    """Fill ``logprob`` and ``lse``. Shapes and dtypes are the caller's business; the last dimension is contiguous."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    kernels = _kernels()
    with _on(logits.device):
        kernels.token_logprobs_forward_kernel[(rows,)](
            logits,
            targets,
            logprob,
            lse,
            vocabulary,
            logits.stride(0),
            ignore_index,
            ACCUMULATOR=_accumulator(logits.dtype),
            BLOCK=kernels.BLOCK,
            num_warps=kernels.NUM_WARPS,
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
    """Fill ``grad_logits``, which is contiguous, like every one-dimensional argument."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    kernels = _kernels()
    with _on(logits.device):
        kernels.token_logprobs_backward_kernel[(rows,)](
            logits,
            targets,
            lse,
            grad_logprob,
            grad_lse,
            grad_logits,
            vocabulary,
            logits.stride(0),
            ignore_index,
            ACCUMULATOR=_accumulator(logits.dtype),
            BLOCK=kernels.BLOCK,
            num_warps=kernels.NUM_WARPS,
        )


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    want_entropy: bool,
    unit_gradients: bool,
    ignore_index: int,
) -> LinearTokenLogprobs:
    """As ``entropy_fast.reference.linear_token_logprobs``."""
    raise NotImplementedError


def precondition_accumulate(
    table: AccumulationTable, dots: Tensor, x_scale: float, g_scale: float, update: bool
) -> None:
    """Fill ``dots`` and, with ``update``, add to the sums of the table."""
    raise NotImplementedError
