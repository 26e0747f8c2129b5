"""Packed attention in one call for all sequences, by the compiled kernels: nothing is padded, and no mask is made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from entropy_fast.ops.attention_inputs import AttentionInputs, PrefixSums
from entropy_fast.ops.packed_attention import packed_attention_backward
from entropy_fast.ways.packed.groups import AttentionGroups
from entropy_fast.ways.packed.prefix_states import PrefixStates
from entropy_fast.ways.packed.scores import AttentionOptions

__all__ = ["native_backward", "native_inputs"]


def native_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: AttentionGroups,
    prefix: PrefixStates | None,
    options: AttentionOptions,
) -> AttentionInputs:
    """What the kernels begin with, for q [1, heads, N, D], k and v."""
    states = (None, None) if prefix is None else (prefix.key, prefix.value)
    q, k, v = (_with_whole_heads(t.detach()[0]) for t in (query, key, value))
    before, values = (None if t is None else _with_whole_heads(t.detach()[0]) for t in states)
    return AttentionInputs(q, k, v, before, values, groups.sequences, options.scale, options.window)


def native_backward(
    inputs: AttentionInputs,
    output: Tensor,
    log_sums: Tensor,
    above: Tensor,
    groups: AttentionGroups,
    prefix: PrefixStates | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, heads or key heads, D] gradients of q, k and v for ``above`` [N, heads, D]; o and its sums are of the forward."""
    sums = None
    if prefix is not None and prefix.wanted:
        sums = PrefixSums(weights[0].to(prefix.wide).contiguous(), *prefix.sums(len(weights[0])))
    runs = groups.each if sums is None else groups.by_prefix
    above = _with_whole_heads(above.transpose(0, 1))
    return packed_attention_backward(inputs, above, output, log_sums, runs, sums)


def _with_whole_heads(packed: Tensor) -> Tensor:
    """[heads, N, D] whose heads of a token are in one piece."""
    return packed if packed.stride(-1) == 1 else packed.contiguous()
