"""Causal attention over sequences packed end to end, some of which continue from prefixes that they share.

Compiled kernels do it for all sequences in one call on CPUs (csrc/packed_attention.h), and torch a few at a time elsewhere and
with whatever else a layer asks for (`padded_attention`). ``entropy_fast.reference.packed_attention`` says what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.ops import native_backend
from entropy_fast.ops.attention_inputs import AttentionInputs, PrefixSums
from entropy_fast.ops.backends import count_call, runs_natively
from entropy_fast.ops.padded_attention import padded_backward, padded_forward
from entropy_fast.ops.registration import accumulator

__all__ = ["packed_attention", "packed_attention_backward"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@torch.no_grad()
def packed_attention(inputs: AttentionInputs) -> Tensor:
    """O of every query.

    Args:
        inputs: on any device. Nothing is kept for a backward.

    Returns:
        [N, heads, D'].

    Raises:
        ConfigError: shapes, dtypes or devices do not fit.
    """
    inputs.check()
    if not _runs_natively(inputs):
        count_call("reference", "packed_attention")
        return padded_forward(inputs)
    count_call("native", "packed_attention")
    heads, tokens, size = inputs.query.shape
    output = inputs.query.new_empty(tokens, heads, size)
    native_backend.packed_attention_forward(inputs, output)
    return output


@torch.no_grad()
def packed_attention_backward(
    inputs: AttentionInputs, above: Tensor, sums: PrefixSums | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and what goes back to the prefixes.

    Args:
        inputs: of the forward.
        above: [heads, N, D'] gradient of o.
        sums: where Σ weight ∂/∂k and Σ weight ∂/∂v over every prefix's sequences go; None where they are not wanted.

    Returns:
        [N, heads, D], [N, key heads, D] and [N, key heads, D'], in the dtype of the inputs.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit.
    """
    inputs.check()
    query, value = inputs.query, inputs.value
    if above.shape != (*query.shape[:2], value.shape[2]) or (above.dtype, above.device) != (query.dtype, query.device):
        raise ConfigError(
            f"packed_attention_backward got a gradient of {above.dtype} {tuple(above.shape)} on {above.device}; expected "
            f"{query.dtype} {(*query.shape[:2], value.shape[2])} on {query.device}.",
            fix="pass the gradient of the output, heads first.",
        )
    if sums is not None:
        sums.check(inputs)
    if not _runs_natively(inputs):
        count_call("reference", "packed_attention_backward")
        return padded_backward(inputs, above, sums)
    count_call("native", "packed_attention_backward")
    heads, tokens, size = query.shape
    dq = query.new_empty(tokens, heads, size)
    dk, dv = (dq.new_empty(tokens, len(inputs.key), size, dtype=accumulator(query)) for _ in range(2))
    native_backend.packed_attention_backward(inputs, above, sums, (dq, dk, dv))
    return dq, dk.to(dq.dtype), dv.to(dq.dtype)


def _runs_natively(inputs: AttentionInputs) -> bool:
    query = inputs.query
    fits = query.dtype in _DTYPES and query.shape[2] == inputs.value.shape[2] and inputs.options.softcap is None
    return fits and runs_natively(query.device)
