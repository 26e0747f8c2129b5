"""Packed attention by torch, a few sequences at a time: on every device, with whatever a layer asks for.

Sequences of one prefix, and those of one length without a prefix, are padded to the longest of them inside this module alone.
The backward computes everything again.

Legend: q, k, v queries, keys, values; z scores; p = softmax(z); o = p v. G sequences of a group, K key heads, T the queries of
all heads that share a key head, S the keys that they see.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_fast.ops.attention_inputs import AttentionInputs, AttentionOptions, PackedSequences, PrefixSums
from entropy_fast.ops.registration import accumulator

__all__ = ["padded_backward", "padded_forward"]

# Scores that are written out at a time.
_AT_ONCE = 2**22


def padded_forward(inputs: AttentionInputs) -> Tensor:
    """[N, heads, D'] attention."""
    heads, tokens, _ = inputs.query.shape
    output = inputs.query.new_empty(tokens, heads, inputs.value.shape[2])
    for group in _groups(inputs.sequences, inputs.query.device):
        q, k, v, mask = group.operands(inputs)
        found = q.new_empty(*q.shape[:3], v.shape[3])
        for part in _parts(q, k, inputs.options):
            found[part] = _attend(q[part], k[part], v[part], mask, inputs.options)
        group.put(found, output)
    return output


def padded_backward(inputs: AttentionInputs, above: Tensor, sums: PrefixSums | None) -> tuple[Tensor, Tensor, Tensor]:
    """[N, heads or key heads, D or D'] gradients of q, k and v for ``above`` [heads, N, D'], and the sums of the prefixes."""
    dq, dk, dv = (t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (inputs.query, inputs.key, inputs.value))
    for group in _groups(inputs.sequences, inputs.query.device):
        q, k, v, mask = group.operands(inputs)
        padded = group.padded(above, len(inputs.key), repeated=False)
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(q, k, inputs.options):
            own = _attend_backward(q[part], k[part], v[part], mask, inputs.options, padded[part])
            for total, gradient in zip(found, own, strict=True):
                total[part] = gradient
        first, last = group.prefix
        if sums is not None and first < last:
            weights = sums.weights[:, group.rows]
            for total, gradient in zip((sums.key, sums.value), found[1:], strict=True):
                of_prefix = gradient[:, :, : last - first].to(total.dtype)
                total[:, :, first:last] = torch.tensordot(weights, of_prefix, dims=1)
        for total, gradient, before in zip((dq, dk, dv), found, (0, last - first, last - first), strict=True):
            group.put(gradient[:, :, before:], total)
    return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class _Group:
    """Sequences of one prefix, or of one length without a prefix.

    Attributes:
        prefix: span of the prefix.
        rows: [G] of the weights.
        width: tokens of the longest.
        places: [G * width] the token at every padded place; what is too many repeats the last of its sequence.
        kept: [tokens] into the padded places, those that repeat nothing.
        masks: made once for each shape.
    """

    prefix: tuple[int, int]
    rows: Tensor
    width: int
    places: Tensor
    kept: Tensor
    masks: dict[tuple[int, int | None, torch.dtype], Tensor]

    @classmethod
    def of(cls, table: list[list[int]], device: torch.device) -> _Group:
        """Of rows of the table of sequences."""
        width = max(end - begin for begin, end, *_ in table)
        places = [torch.arange(begin, begin + width).clamp(max=end - 1) for begin, end, *_ in table]
        kept = [torch.arange(end - begin) + number * width for number, (begin, end, *_) in enumerate(table)]
        rows = torch.tensor([row for *_, row in table])
        _, _, first, last, _ = table[0]
        return cls((first, last), rows.to(device), width, torch.cat(places).to(device), torch.cat(kept).to(device), {})

    def operands(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Padded q [G, K, T, D], k and v [G, K, S, D] with the prefix's before the group's own, and the mask [T, S]."""
        key_heads, (first, last) = len(inputs.key), self.prefix
        q, k, v = (self.padded(t, key_heads) for t in (inputs.query, inputs.key, inputs.value))
        if first < last and inputs.prefix_key is not None and inputs.prefix_value is not None:
            states = (inputs.prefix_key, inputs.prefix_value)
            k, v = (
                torch.cat([state[None, :, first:last].to(own.dtype).expand(len(own), -1, -1, -1), own], 2)
                for state, own in zip(states, (k, v), strict=True)
            )
        shared, window = len(inputs.query) // key_heads, inputs.options.window
        key = (shared, window, q.dtype)
        if key not in self.masks:
            self.masks[key] = _causal_mask(last - first, self.width, window, q).repeat(shared, 1)
        return q, k, v, self.masks[key]

    def padded(self, packed: Tensor, key_heads: int, *, repeated: bool = True) -> Tensor:
        """[heads, N, D] to [G, K, heads that share one * width, D], with zeros for what is too many unless repeated."""
        if repeated or len(self.kept) == len(self.places):
            own = packed.index_select(1, self.places)
        else:
            own = packed.new_zeros(packed.shape[0], len(self.places), packed.shape[2])
            own[:, self.kept] = packed.index_select(1, self.places[self.kept])
        own = own.view(key_heads, -1, len(self.rows), self.width, own.shape[2])
        # On a GPU factors stay in 16 bits, as transformers has them.
        dtype = accumulator(packed) if packed.device.type == "cpu" else packed.dtype
        return own.permute(2, 0, 1, 3, 4).flatten(2, 3).to(dtype)

    def put(self, padded: Tensor, packed: Tensor) -> None:
        """The other way, into ``packed`` [N, heads, D]."""
        count, key_heads, _, size = padded.shape
        rows = (
            padded.reshape(count, key_heads, -1, self.width, size)
            .permute(0, 3, 1, 2, 4)
            .reshape(count * self.width, -1, size)
        )
        packed[self.places[self.kept]] = rows.index_select(0, self.kept).to(packed.dtype)


def _groups(sequences: PackedSequences, device: torch.device) -> list[_Group]:
    """The sequences that have a token, made once for each device."""
    key = (_Group, device)
    if key not in sequences.derived:
        table = [row for row in sequences.table.tolist() if row[0] < row[1]]
        together = itertools.groupby(table, lambda row: (row[2], row[3]) if row[2] < row[3] else row[1] - row[0])
        sequences.derived[key] = [_Group.of(list(rows), device) for _, rows in together]
    found: list[_Group] = sequences.derived[key]
    return found


def _causal_mask(prefix: int, width: int, window: int | None, like: Tensor) -> Tensor:
    """[width, prefix + width]: 0 where a query, which follows the prefix, sees a key, and -inf elsewhere."""
    query = prefix + torch.arange(width, device=like.device)[:, None]
    place = torch.arange(prefix + width, device=like.device)[None]
    hidden = place > query
    if window is not None:
        hidden |= place <= query - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)


def _fused(query: Tensor, options: AttentionOptions) -> bool:
    """Whether torch's fused kernels are called. Those of CPUs lose the gradients of a saturated softmax, or make them NaN."""
    return query.device.type != "cpu" and options.softcap is None and options.sinks is None


def _parts(query: Tensor, key: Tensor, options: AttentionOptions) -> Iterator[slice]:
    """A few sequences at a time where scores are written out."""
    scores = query.shape[1] * query.shape[2] * key.shape[2]
    size = len(query) if _fused(query, options) else max(1, _AT_ONCE // scores)
    for begin in range(0, len(query), size):
        yield slice(begin, begin + size)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """[G, K, T, D'] o."""
    if _fused(query, options):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=options.scale)
    p, _ = _probabilities(query, key, mask, options)
    return p[..., : key.shape[2]].to(value.dtype) @ value


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions, above: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v for ``above`` [G, K, T, D']."""
    if _fused(query, options):
        with torch.enable_grad():
            leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
            output = _attend(*leaves, mask, options)
        return torch.autograd.grad(output, leaves, above)
    p, slope = _probabilities(query, key, mask, options)
    keys = key.shape[2]
    dv = p[..., :keys].to(above.dtype).transpose(2, 3) @ above
    # A sink has no value, and so dp = 0.
    dp = F.pad((above @ value.transpose(2, 3)).to(p.dtype), (0, p.shape[3] - keys))
    # p (dp - Σ p dp) with every dp counted from that of the likeliest key: nothing large is left to cancel.
    dp -= dp.gather(-1, p.argmax(-1, keepdim=True))
    dz = (p * (dp - (p * dp).sum(-1, keepdim=True)))[..., :keys]
    dz = dz.mul_(options.scale if slope is None else options.scale * slope).to(query.dtype)
    return dz @ key, dz.transpose(2, 3) @ query, dv


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """[G, K, T, S] p, of a sink last, and the derivative of the softcap at each score where there is one; fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    z, slope = (query @ key.transpose(2, 3)).to(wide) * options.scale, None
    if options.softcap is not None:
        bent = torch.tanh(z / options.softcap)
        z, slope = options.softcap * bent, 1 - bent.square()
    z += mask
    if options.sinks is not None:
        # One for each query of the heads that share a key head.
        sinks = options.sinks.to(z.dtype).repeat_interleave(z.shape[1] * z.shape[2] // len(options.sinks))
        z = torch.cat([z, sinks.view(1, *z.shape[1:3], 1).expand(len(z), -1, -1, 1)], -1)
    return z.softmax(-1), slope
