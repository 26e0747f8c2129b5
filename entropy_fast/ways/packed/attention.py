"""Attention over packed sequences, whose responses also see the keys and values of their prompt, in a model's run.

Nothing but q, k and v is kept for the backward. That also fills in what goes back to the prompts (`PrefixStates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast import ops
from entropy_fast.ops.attention_inputs import AttentionInputs, AttentionOptions, PrefixSums
from entropy_fast.ways.packed.groups import AttentionGroups
from entropy_fast.ways.packed.prefix_states import PrefixStates

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
        options: scale, window, softcap, sinks.

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
        ctx.save_for_backward(query, key, value)
        if groups.copies:
            prefix = _first_copy(key, value, groups, wanted=False)
        return ops.packed_attention(_inputs(query, key, value, groups, prefix, options)).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        groups, prefix, weights = ctx.groups, ctx.prefix, ctx.weights
        # Read once: under gradient checkpointing every reading asks for the saved tensors anew.
        query, key, value = ctx.saved_tensors
        if groups.copies:
            prefix = _first_copy(key, value, groups, wanted=ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        sums = None
        if prefix is not None and prefix.wanted:
            sums = PrefixSums(weights[0].to(prefix.wide).contiguous(), *prefix.sums(len(weights[0])))
        inputs = _inputs(query, key, value, groups, prefix, ctx.options)
        found = ops.packed_attention_backward(inputs, gradient[0].transpose(0, 1), sums)
        if groups.copies and sums is not None:
            for gradient_of, cotangents in zip(found[1:], (sums.key, sums.value), strict=True):
                groups.add_to_copies(gradient_of, cotangents, weights[1])
        dq, dk, dv = (t.transpose(0, 1).unsqueeze(0) for t in found)
        return dq, dk, dv, None, None, None, None


def _first_copy(key: Tensor, value: Tensor, groups: AttentionGroups, *, wanted: bool) -> PrefixStates:
    """The keys and values of the prefixes that stand in the packed row itself."""
    return PrefixStates(key[:, :, groups.copy(0)], value[:, :, groups.copy(0)], wanted)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: AttentionGroups,
    prefix: PrefixStates | None,
    options: AttentionOptions,
) -> AttentionInputs:
    before, values = (None, None) if prefix is None else (prefix.key[0], prefix.value[0])
    return AttentionInputs(query[0], key[0], value[0], before, values, groups.sequences, options)
