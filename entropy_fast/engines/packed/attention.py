"""Attention over packed sequences, whose responses also see the keys and values of their prompt.

Legend: K_p and V_p keys and values of a prompt, c_i and a_i coefficients of response i.

Each prompt is a group of G sequences, padded to the longest of them inside this function alone. Nothing but q, k and v is kept
for the backward, which computes the scores again. It also adds up every response's own ∂S_i/∂K_p and ∂S_i/∂V_p, with c_i and
with a_i, in place of sending their plain sum back: that would no longer know the responses apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_fast.engines.packed.layout import PackedGroup

__all__ = ["AttentionGroups", "AttentionOptions", "PrefixStates", "packed_attention"]


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of its attention.

    Attributes:
        scale: of the scores.
        window: keys further back than this (counting the query's own) are not seen; None for all.
        softcap: scores are ``softcap * tanh(scores / softcap)``; None for none.
    """

    scale: float
    window: int | None
    softcap: float | None


class PrefixStates:
    """K_p and V_p of one layer, and what comes back to them.

    Args:
        key, value: [1, heads, P, D] packed, with the graph of the prompts' forward.

    Attributes:
        key, value: the same.
        cotangents: Σ c_i ∂S_i/∂K_p and Σ a_i ∂S_i/∂K_p, [2, heads, P, D] in fp32 or wider, and likewise of V_p; None before
            a backward.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value
        self.cotangents: tuple[Tensor, Tensor] | None = None

    def add(self, group: PackedGroup, weights: Tensor, key: Tensor, value: Tensor) -> None:
        """Add a group's ∂S_i/∂K_p and ∂S_i/∂V_p [G, heads, P of the group, D] with ``weights`` [2, G] c and a."""
        wide = torch.promote_types(self.key.dtype, torch.float32)
        if self.cotangents is None:
            shape = (2, *self.key.shape[1:])
            self.cotangents = (
                self.key.new_zeros(shape, dtype=wide),
                self.key.new_zeros((2, *self.value.shape[1:]), dtype=wide),
            )
        begin, end = group.prefix
        for total, found in zip(self.cotangents, (key, value), strict=True):
            total[:, :, begin:end] = torch.tensordot(weights.to(wide), found.to(wide), dims=1)


class AttentionGroups:
    """Where the sequences of every group stand in the packed row, and the masks between them.

    Args:
        groups: of the layout.
        tails: whether the packed row is that of the tails; otherwise that of the prefixes, one sequence a group.
        device: of the row.
    """

    def __init__(self, groups: Sequence[PackedGroup], *, tails: bool, device: torch.device) -> None:
        self.device = device
        self.parts: list[_Part] = []
        self.tails = tails
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}
        for group in groups:
            spans = group.tails if tails else (group.prefix,)
            lengths = [end - begin for begin, end in spans]
            if max(lengths) == 0:
                continue
            begin, width = spans[0][0], max(lengths)
            even = all(length == width for length in lengths)
            places = torch.stack([(first - begin + torch.arange(width)).clamp(max=sum(lengths) - 1) for first, _ in spans])
            kept = torch.cat([torch.arange(n) + r * width for r, n in enumerate(lengths)])
            self.parts.append(
                _Part(
                    group,
                    begin,
                    spans[-1][1],
                    width,
                    None if even else places.flatten().to(device),
                    None if even else kept.to(device),
                )
            )

    def mask(self, prefix: int, width: int, window: int | None) -> Tensor:
        """[width, prefix + width] bool: which keys a query sees."""
        key = (prefix, width, window)
        if key not in self._masks:
            query = prefix + torch.arange(width, device=self.device)[:, None]
            column = torch.arange(prefix + width, device=self.device)[None]
            seen = column <= query
            if window is not None:
                seen &= column > query - window
            self._masks[key] = seen
        found = self._masks[key]
        assert found is not None
        return found


@dataclasses.dataclass(frozen=True)
class _Part:
    """A group with at least one token: its span, the padded width, and the indices between the two forms."""

    group: PackedGroup
    begin: int
    end: int
    width: int
    places: Tensor | None  # [G * width] into the span; None where all sequences have the same length
    kept: Tensor | None  # [tokens] into G * width

    def padded(self, packed: Tensor) -> Tensor:
        """[heads, N, D] to [G, heads, width, D] of the group."""
        own = packed[:, self.begin : self.end]
        if self.places is not None:
            own = own.index_select(1, self.places)
        return own.view(own.shape[0], -1, self.width, own.shape[-1]).transpose(0, 1)

    def packed(self, padded: Tensor) -> Tensor:
        """[G, heads, width, D] to [heads, tokens of the group, D]."""
        flat = padded.transpose(0, 1).flatten(1, 2)
        return flat if self.kept is None else flat.index_select(1, self.kept)


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
        query: [1, heads, N, D]; ``key`` and ``value`` [1, key heads, N, D] of the same tokens.
        groups: where the sequences are.
        prefix: keys and values that the sequences of each group continue from; None where there are none.
        weights: filled before the backward with one tensor [2, n] of c and a by row of the microbatch.
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
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.prefix, ctx.weights, ctx.options = groups, prefix, weights, options
        heads, tokens = query.shape[1:3]
        output = query.new_empty(heads, tokens, value.shape[-1])
        for part in groups.parts:
            q, k, v = (part.padded(t[0]) for t in (query, key, value))
            k, v = _continued(part, prefix, k, v)
            found = _attend(q, k, v, groups.mask(k.shape[2] - part.width, part.width, options.window), options)
            output[:, part.begin : part.end] = part.packed(found)
        return output.transpose(0, 1).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        groups, prefix, options = ctx.groups, ctx.prefix, ctx.options
        found = [torch.zeros_like(t) for t in (query, key, value)]
        above = gradient[0].transpose(0, 1)
        for part in groups.parts:
            q, k, v = (part.padded(t[0]) for t in (query, key, value))
            k, v = _continued(part, prefix, k, v)
            length = k.shape[2] - part.width
            with torch.enable_grad():
                q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
                again = _attend(q, k, v, groups.mask(length, part.width, options.window), options)
            # Padded places repeat a real token, and get no gradient.
            of = _padded_gradient(part, above, again)
            dq, dk, dv = torch.autograd.grad(again, (q, k, v), of)
            if length and prefix is not None and prefix.key.requires_grad:
                begin, end = part.group.rows
                prefix.add(part.group, ctx.weights[0][:, begin:end], dk[:, :, :length], dv[:, :, :length])
            for total, own in zip(found, (dq, dk[:, :, length:], dv[:, :, length:]), strict=True):
                total[0, :, part.begin : part.end] = part.packed(own)
        return found[0], found[1], found[2], None, None, None, None


def _padded_gradient(part: _Part, above: Tensor, like: Tensor) -> Tensor:
    own = above[:, part.begin : part.end]
    if part.kept is None:
        return part.padded(above)
    flat = own.new_zeros(own.shape[0], like.shape[0] * part.width, own.shape[-1])
    flat[:, part.kept] = own
    return flat.view(own.shape[0], -1, part.width, own.shape[-1]).transpose(0, 1)


def _continued(part: _Part, prefix: PrefixStates | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [G, heads, P + width, D] with those of the prefix before a group's own."""
    begin, end = part.group.prefix
    if prefix is None or begin == end:
        return key, value
    before = [t.detach()[:, :, begin:end].expand(key.shape[0], -1, -1, -1) for t in (prefix.key, prefix.value)]
    return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """[G, heads, width, D] outputs. Queries that share a key head stand in one line: keys are read once for all of them."""
    count, heads, width, size = query.shape
    shared = heads // key.shape[1]
    folded = query.reshape(count, key.shape[1], shared * width, size)
    mask = mask.repeat(shared, 1)
    if options.softcap is None:
        found = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=options.scale)
    else:
        scores = folded @ key.transpose(2, 3) * options.scale
        scores = options.softcap * torch.tanh(scores / options.softcap)
        scores = scores.masked_fill(~mask, -math.inf)
        # In fp32 or wider, as transformers has it.
        wide = torch.promote_types(scores.dtype, torch.float32)
        found = torch.softmax(scores, -1, dtype=wide).to(value.dtype) @ value
    return found.reshape(count, heads, width, value.shape[-1])
