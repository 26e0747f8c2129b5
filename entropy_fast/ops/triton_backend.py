"""Launches of the kernels in :mod:`entropy_fast.kernels`: the backend ``triton``."""

from __future__ import annotations

import importlib
import struct

import torch
from torch import Tensor

from entropy_fast.ops.accumulation_table import CHUNK, AccumulationTable
from entropy_fast.ops.registration import accumulator
from entropy_fast.ops.triton_launch_linear import linear_token_logprobs
from entropy_fast.ops.triton_loading import interpreting, kernels_of, load, on_device, triton_type

__all__ = [
    "detail",
    "linear_token_logprobs",
    "precondition_accumulate",
    "reason",
    "token_logprobs_backward",
    "token_logprobs_forward",
]


def reason(device_type: str) -> str:
    """Why Triton kernels cannot run on a device type; empty where they can."""
    kernels, why_not = load()
    if kernels is None:
        return why_not
    if device_type == "cuda":
        return "" if torch.cuda.is_available() else "torch sees no CUDA device"
    if device_type == "cpu":
        return "" if interpreting() else "it runs on CUDA tensors (on CPU tensors only with TRITON_INTERPRET=1)"
    return f"it runs on CUDA tensors, not on {device_type}"


def detail() -> str:
    """Triton's version."""
    return f"triton {importlib.import_module('triton').__version__}"


def token_logprobs_forward(
    logits: Tensor, targets: Tensor, logprob: Tensor, lse: Tensor, entropy: Tensor | None, ignore_index: int
) -> None:
    """Fill ``logprob``, ``lse`` and ``entropy``. Shapes and dtypes are the caller's business; rows are contiguous."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    kernels = kernels_of("token_logprobs")
    with on_device(logits.device):
        kernels.token_logprobs_forward_kernel[(rows,)](
            logits,
            targets,
            logprob,
            lse,
            entropy,
            vocabulary,
            logits.stride(0),
            ignore_index,
            ACCUMULATOR=triton_type(accumulator(logits)),
            HAS_ENTROPY=entropy is not None,
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
    """Fill ``grad_logits``, whose rows are contiguous and which may be ``logits``."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    kernels = kernels_of("token_logprobs")
    with on_device(logits.device):
        kernels.token_logprobs_backward_kernel[(rows,)](
            logits,
            targets,
            lse,
            entropy,
            grad_logprob,
            grad_lse,
            grad_entropy,
            grad_logits,
            vocabulary,
            logits.stride(0),
            grad_logits.stride(0),
            ignore_index,
            ACCUMULATOR=triton_type(accumulator(logits)),
            HAS_ENTROPY=grad_entropy is not None,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.NUM_WARPS,
        )


def precondition_accumulate(
    table: AccumulationTable, dots: Tensor, x_scale: float, g_scale: float, update: bool
) -> None:
    """Fill ``dots`` and, with ``update``, add to the sums of the table. Nothing waits for the device."""
    if table.n_tensors == 0:
        return
    kernels = kernels_of("precondition_accumulate")
    partial_dots = torch.empty(table.n_chunks, 3, dtype=torch.float64, device=dots.device)
    with on_device(dots.device):
        if table.n_chunks:
            kernels.precondition_accumulate_kernel[(table.n_chunks,)](
                table.entries,
                table.factors,
                table.owners,
                partial_dots,
                _bits(x_scale),
                _bits(g_scale),
                KINDS=sum(1 << kind for kind in table.kinds),
                UPDATE=update,
                CHUNK=CHUNK,
                BLOCK=kernels.BLOCK,
                num_warps=kernels.NUM_WARPS,
            )
        kernels.sum_dots_kernel[(table.n_tensors,)](
            table.entries, partial_dots, dots, table.n_tensors, table.n_chunks, BLOCK=kernels.DOTS_BLOCK
        )


def _bits(value: float) -> int:
    """The bit pattern of a float64: Triton would pass a float as float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
