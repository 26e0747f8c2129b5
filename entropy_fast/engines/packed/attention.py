"""Attention over packed sequences, whose responses also see the keys and values of their prompt.

Legend: K_p and V_p keys and values of a prompt, c_i and a_i coefficients of response i.

Each prompt is a group of G sequences, padded to the longest of them inside this function alone. Nothing but q, k and v is kept
for the backward, which computes the scores again. It also adds up every response's own ∂S_i/∂K_p and ∂S_i/∂V_p, with c_i and
with a_i, in place of sending their plain sum back: that would no longer know the responses apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast.engines.packed.layout import PackedGroup
from entropy_fast.engines.packed.scores import AttentionOptions, attend, attend_backward, causal_mask

__all__ = ["AttentionGroups", "PrefixStates", "packed_attention"]


class PrefixStates:
    """K_p and V_p of one layer, and what comes back to them.

    Args:
        key: [1, heads, P, D] packed, with the graph of the prompts' forward.
        value: likewise.

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
        self._masks: dict[tuple[int, int, int, int | None, torch.dtype], Tensor] = {}
        for group in groups:
            spans = group.tails if tails else (group.prefix,)
            lengths = [end - begin for begin, end in spans]
            if max(lengths) == 0:
                continue
            begin, width = spans[0][0], max(lengths)
            even = all(length == width for length in lengths)
            places = torch.stack(
                [(first - begin + torch.arange(width)).clamp(max=sum(lengths) - 1) for first, _ in spans]
            )
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

    def mask(self, prefix: int, width: int, repeat: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`causal_mask`, made once for each shape."""
        key = (prefix, width, repeat, window, dtype)
        if key not in self._masks:
            self._masks[key] = causal_mask(prefix, width, repeat, window, dtype, self.device)
        return self._masks[key]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A group with at least one token: its span, the padded width, and the indices between the two forms."""

    group: PackedGroup
    begin: int
    end: int
    width: int
    places: Tensor | None  # [G * width] into the span; None where all sequences have the same length
    kept: Tensor | None  # [tokens] into G * width

    def padded(self, packed: Tensor, key_heads: int) -> Tensor:
        """[N, heads, D] to [G, key heads, heads that share one * width, D] of the group."""
        own = packed[self.begin : self.end]
        if self.places is not None:
            own = own.index_select(0, self.places)
        own = own.view(-1, self.width, key_heads, own.shape[1] // key_heads, own.shape[2])
        return own.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def packed(self, padded: Tensor) -> Tensor:
        """The other way: [tokens of the group, heads, D]; what is padding is dropped."""
        count, key_heads, length, size = padded.shape
        rows = padded.view(count, key_heads, length // self.width, self.width, size)
        rows = rows.permute(0, 3, 1, 2, 4).reshape(count * self.width, -1, size)
        return rows if self.kept is None else rows.index_select(0, self.kept)

    def padded_gradient(self, above: Tensor, key_heads: int) -> Tensor:
        """As `padded`, with zeros in padded places, which repeat a real token."""
        if self.kept is None:
            return self.padded(above, key_heads)
        own = above[self.begin : self.end]
        count = len(self.places) if self.places is not None else 0
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.kept] = own
        rows = rows.view(-1, self.width, key_heads, own.shape[1] // key_heads, own.shape[2])
        return rows.permute(0, 2, 3, 1, 4).flatten(2, 3)


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
        ctx.groups, ctx.prefix, ctx.weights, ctx.options = groups, prefix, weights, options
        by_token = [t[0].transpose(0, 1) for t in (query, key, value)]
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        log_sums = []
        for part in groups.parts:
            q, k, v, mask = _inputs(part, by_token, groups, prefix, options)
            found, known = attend(q, k, v, mask, options)
            output[part.begin : part.end] = part.packed(found)
            log_sums.append(known)
        output = output.unsqueeze(0)
        ctx.save_for_backward(query, key, value, output, *log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        groups, prefix, options = ctx.groups, ctx.prefix, ctx.options
        # Read once: under gradient checkpointing every reading asks for the saved tensors anew.
        query, key, value, output, *all_log_sums = ctx.saved_tensors
        by_token = [t[0].transpose(0, 1) for t in (query, key, value)]
        found = [torch.empty_like(t) for t in by_token]
        for part, log_sums in zip(groups.parts, all_log_sums, strict=True):
            q, k, v, mask = _inputs(part, by_token, groups, prefix, options)
            length = k.shape[2] - part.width
            above = part.padded_gradient(gradient[0], k.shape[1])
            again = None if log_sums is None else part.padded(output[0], k.shape[1])
            dq, dk, dv = attend_backward(q, k, v, mask, options, above, again, log_sums)
            if length and prefix is not None and (prefix.key.requires_grad or prefix.value.requires_grad):
                begin, end = part.group.rows
                prefix.add(part.group, ctx.weights[0][:, begin:end], dk[:, :, :length], dv[:, :, :length])
            for total, own in zip(found, (dq, dk[:, :, length:], dv[:, :, length:]), strict=True):
                total[part.begin : part.end] = part.packed(own.contiguous())
        dq, dk, dv = (t.transpose(0, 1).unsqueeze(0) for t in found)
        return dq, dk, dv, None, None, None, None


def _inputs(
    part: _Part,
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
