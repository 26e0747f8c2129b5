"""Packed attention a group at a time, by torch: on every device, with whatever a layer asks for.

Each prompt is a group of G sequences, padded to the longest of them inside this module alone. The backward computes the scores
again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.ways.packed.groups import AttentionGroups, GroupPart
from entropy_fast.ways.packed.prefix_states import PrefixStates
from entropy_fast.ways.packed.scores import AttentionOptions, attend, attend_backward

__all__ = ["padded_backward", "padded_forward"]


def padded_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: AttentionGroups,
    prefix: PrefixStates | None,
    options: AttentionOptions,
) -> tuple[Tensor, list[Tensor | None]]:
    """[N, heads, D'] attention of q [1, heads, N, D], and of every group what its kernel wants to know in the backward."""
    by_token = [t[0].transpose(0, 1) for t in (query, key, value)]
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    log_sums = []
    for part in groups.parts:
        q, k, v, mask = _inputs(part, by_token, groups, prefix, options)
        found, known = attend(q, k, v, mask, options)
        output[part.begin : part.end] = part.packed(found)
        log_sums.append(known)
    return output, log_sums


def padded_backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    log_sums: Sequence[Tensor | None],
    above: Tensor,
    groups: AttentionGroups,
    prefix: PrefixStates | None,
    weights: Sequence[Tensor],
    options: AttentionOptions,
) -> list[Tensor]:
    """[N, heads or key heads, D or D'] gradients of q, k and v, which with o are ``saved``, for ``above`` [N, heads, D']."""
    by_token = [t[0].transpose(0, 1) for t in saved[:3]]
    output = saved[3]
    found = [torch.empty_like(t) for t in by_token]
    for part, known in zip(groups.parts, log_sums, strict=True):
        q, k, v, mask = _inputs(part, by_token, groups, prefix, options)
        length = k.shape[2] - part.width
        padded = part.padded_gradient(above, k.shape[1])
        again = None if known is None else part.padded(output, k.shape[1])
        dq, dk, dv = attend_backward(q, k, v, mask, options, padded, again, known)
        if length and prefix is not None and prefix.wanted:
            begin, end = part.group.rows
            prefix.put(part.group, weights[0][:, begin:end], dk[:, :, :length], dv[:, :, :length])
        for total, own in zip(found, (dq, dk[:, :, length:], dv[:, :, length:]), strict=True):
            total[part.begin : part.end] = part.packed(own.contiguous())
    return found


def _inputs(
    part: GroupPart,
    by_token: Sequence[Tensor],
    groups: AttentionGroups,
    prefix: PrefixStates | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded q [G, key heads, T, D], k and v [G, key heads, S, D] with the prefix's before the group's own, and the mask."""
    key_heads = by_token[1].shape[1]
    q, k, v = (part.padded(t, key_heads) for t in by_token)
    begin, end = part.group.prefix
    if prefix is not None and begin != end:
        before = [t.detach()[:, :, begin:end].expand(k.shape[0], -1, -1, -1) for t in (prefix.key, prefix.value)]
        k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
    repeat = q.shape[2] // part.width
    mask = groups.mask(k.shape[2] - part.width, part.width, repeat, options.window, q.dtype)
    return q, k, v, mask
