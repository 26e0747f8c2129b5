"""Causal attention over sequences packed end to end, which may share prefixes, by compiled kernels for CPUs.

There is no other backend of it here: who calls it asks `takes_packed_attention` first, and has another way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.ops import native_backend
from entropy_fast.ops.attention_inputs import AttentionInputs, PrefixSums
from entropy_fast.ops.backends import count_call, runs_natively
from entropy_fast.ops.registration import accumulator

__all__ = ["packed_attention", "packed_attention_backward", "takes_packed_attention"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def takes_packed_attention(inputs: AttentionInputs) -> bool:
    """Whether the kernels take these, and are there, and ``ENTROPY_FAST_BACKEND`` does not name something else."""
    query, value = inputs.query, inputs.value
    given = [query, inputs.key, value, inputs.prefix_key, inputs.prefix_value]
    alike = all(t is None or (t.device.type == "cpu" and t.dtype == query.dtype) for t in given)
    fits = (
        query.dtype in _DTYPES
        and query.shape[-1] == value.shape[-1] > 0
        and (inputs.window is None or inputs.window > 0)
    )
    return alike and fits and runs_natively(query.device)


def packed_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """O and log Σ exp(scores) of every query.

    Args:
        inputs: that `takes_packed_attention` takes. Nothing is kept for a backward.

    Returns:
        [N, heads, D], and [N, heads] in fp32 or wider.

    Raises:
        NativeLibraryError: the sizes do not fit.
    """
    heads, tokens, size = inputs.query.shape
    output = inputs.query.new_empty(tokens, heads, size)
    log_sums = output.new_empty(tokens, heads, dtype=accumulator(inputs.query))
    native_backend.packed_attention_forward(inputs, output, log_sums)
    count_call("native", "packed_attention")
    return output, log_sums


def packed_attention_backward(
    inputs: AttentionInputs, above: Tensor, output: Tensor, log_sums: Tensor, runs: Tensor, sums: PrefixSums | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and what goes back to the prefixes.

    Args:
        inputs: of the forward.
        above: [heads, N, D] gradient of o; the elements of a head of a token stand next to one another.
        output: of the forward, contiguous.
        log_sums: likewise.
        runs: [R + 1] int64 (CPU): bounds of runs of sequences of one prefix. With ``sums``, all sequences of a prefix are
            in one run.
        sums: where Σ weight ∂/∂k and Σ weight ∂/∂v over every prefix's sequences go; None where they are not wanted.

    Returns:
        [N, heads, D] and twice [N, key heads, D], in the dtype of the inputs.

    Raises:
        NativeLibraryError: the sizes do not fit.
    """
    heads, tokens, size = inputs.query.shape
    dq = inputs.query.new_empty(tokens, heads, size)
    dk, dv = (dq.new_empty(tokens, len(inputs.key), size, dtype=accumulator(inputs.query)) for _ in range(2))
    native_backend.packed_attention_backward(inputs, above, output, log_sums, runs, sums, (dq, dk, dv))
    count_call("native", "packed_attention_backward")
    return dq, dk.to(dq.dtype), dv.to(dq.dtype)
