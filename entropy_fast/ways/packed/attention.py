"""Attention over packed sequences, whose responses also see the keys and values of their prompt.

Nothing but q, k, v, o and the sums of its softmax is kept for the backward. That also fills in what goes back to the prompts
(`PrefixStates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast.ops.packed_attention import packed_attention as native_forward
from entropy_fast.ops.packed_attention import takes_packed_attention
from entropy_fast.ways.packed.groups import AttentionGroups
from entropy_fast.ways.packed.native_attention import native_backward, native_inputs
from entropy_fast.ways.packed.padded_attention import padded_backward, padded_forward
from entropy_fast.ways.packed.prefix_states import PrefixStates
from entropy_fast.ways.packed.scores import AttentionOptions

__all__ = ["packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: AttentionGroups,
    prefix: PrefixStates | None,
    weights: Sequence[Tensor],
    options: AttentionOptions,
) -> Tensor:
    """Causal attention within every sequence, and of tails to their prefixes.

    Args:
        query: [1, heads, N, D].
        key: [1, key heads, N, D] of the same tokens.
        value: likewise.
        groups: where the sequences are.
        prefix: keys and values that the sequences of each group continue from; None where there are none, or where they are
            in the packed row themselves.
        weights: filled before every backward with a tensor [C, n], `Cotangent.weights` by row of the microbatch; and where
            the packed row has copies of the prefixes, with one [C, P] that what goes back to them is multiplied by.
        options: scale, window, softcap.

    Returns:
        [1, N, heads, D].
    """
    result: Tensor = _PackedAttention.apply(query, key, value, groups, prefix, weights, options)  # type: ignore[no-untyped-call]
    return result


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: AttentionGroups,
        prefix: PrefixStates | None,
        weights: Sequence[Tensor],
        options: AttentionOptions,
    ) -> Tensor:
        ctx.groups, ctx.prefix, ctx.weights, ctx.options = groups, prefix, weights, options
        if groups.copies:
            prefix = _first_copy(key, value, groups, wanted=False)
        inputs = native_inputs(query, key, value, groups, prefix, options)
        ctx.native = options.softcap is None and takes_packed_attention(inputs)
        log_sums: Sequence[Tensor | None]
        if ctx.native:
            output, *log_sums = native_forward(inputs)
        else:
            output, log_sums = padded_forward(query, key, value, groups, prefix, options)
        output = output.unsqueeze(0)
        ctx.save_for_backward(query, key, value, output, *log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        groups, prefix, options = ctx.groups, ctx.prefix, ctx.options
        # Read once: under gradient checkpointing every reading asks for the saved tensors anew.
        query, key, value, output, *log_sums = ctx.saved_tensors
        if groups.copies:
            prefix = _first_copy(key, value, groups, wanted=ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        found: Sequence[Tensor]
        if ctx.native:
            inputs = native_inputs(query, key, value, groups, prefix, options)
            found = native_backward(inputs, output[0], log_sums[0], gradient[0], groups, prefix, ctx.weights)
        else:
            saved = (query, key, value, output[0])
            found = padded_backward(saved, log_sums, gradient[0], groups, prefix, ctx.weights, options)
        if groups.copies and prefix.cotangents is not None:
            for gradient_of, cotangents in zip(found[1:], prefix.cotangents, strict=True):
                groups.add_to_copies(gradient_of, cotangents, ctx.weights[1])
        dq, dk, dv = (t.transpose(0, 1).unsqueeze(0) for t in found)
        return dq, dk, dv, None, None, None, None


def _first_copy(key: Tensor, value: Tensor, groups: AttentionGroups, *, wanted: bool) -> PrefixStates:
    """The keys and values of the prefixes that stand in the packed row itself."""
    return PrefixStates(key[:, :, groups.copy(0)], value[:, :, groups.copy(0)], wanted)
