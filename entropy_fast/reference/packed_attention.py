"""Attention over sequences packed end to end, as it is defined: one sequence at a time, its softmax written out.

Legend: z scores, p their softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Tensor,
    *,
    scale: float,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[N, heads, D'] o = Σ p v in fp32 or wider, differentiable in every tensor any number of times.

    Args:
        query: [heads, N, D].
        key: [key heads, N, D]; query heads in a row share a key head.
        value: [key heads, N, D'].
        sequences: [S, 4 or more] first token of each sequence and the one after its last, and the same of its prefix.
        scale: of the scores.
        prefix_key: [key heads, P, D] of the prefixes; None where there are none.
        prefix_value: [key heads, P, D'], likewise.
        window: keys further back than this (counting the query's own) are not seen; None for all.
        softcap: z becomes ``softcap * tanh(z / softcap)``.
        sinks: [heads] one more score for every query, of a key without a value.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    shared = len(query) // len(key)
    q = query.to(wide)
    nothing = [t.new_zeros(len(t), 0, t.shape[2]) for t in (key, value)]
    before = [none if t is None else t for t, none in zip((prefix_key, prefix_value), nothing, strict=True)]
    found = [q.new_zeros(0, len(q), value.shape[2])]
    for begin, end, first, last in sequences[:, :4].tolist():
        k, v = (
            torch.cat([prefix[:, first:last], own[:, begin:end]], 1).to(wide).repeat_interleave(shared, 0)
            for prefix, own in zip(before, (key, value), strict=True)
        )
        z = scale * q[:, begin:end] @ k.transpose(1, 2)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        place = torch.arange(k.shape[1], device=z.device)
        of_query = place[last - first :, None]
        hidden = place > of_query
        if window is not None:
            hidden |= place <= of_query - window
        z = z.masked_fill(hidden, -math.inf)
        if sinks is not None:
            z = torch.cat([z, sinks.to(wide)[:, None, None].expand(-1, end - begin, 1)], -1)
        p = z.softmax(-1)[..., : k.shape[1]]
        found.append((p @ v).transpose(0, 1))
    return torch.cat(found)
