"""Sequences packed end to end into one row of tokens, a prompt's own tokens apart from those of its responses.

    prefixes:  | prompt 0     | prompt 1  | ...                     what all responses of a prompt begin with, once
    tails:     | y y y | y y | y y y y | y y y | ...                the rest of every response but its last token

Nothing is computed for padding. The last token of a response predicts nothing, so it is no input at all; the first token of a
tail is predicted by the last one of its prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.rollouts import Rollouts

__all__ = ["PackedGroup", "PackedLayout", "pack_microbatch", "shared_length"]

Span = tuple[int, int]  # first token, and the one after the last


@dataclasses.dataclass(frozen=True)
class PackedGroup:
    """The sequences of one prompt.

    Attributes:
        unit: whose gradients it adds to.
        rows: its rows of the microbatch.
        prefix: its place among the packed prefixes; empty where nothing is shared.
        tails: place among the packed tails of every row's own tokens, one after the other; some may be empty.
    """

    unit: int
    rows: Span
    prefix: Span
    tails: tuple[Span, ...]

    @property
    def tail_span(self) -> Span:
        """All tails of the group, which stand next to one another."""
        return self.tails[0][0], self.tails[-1][1]


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """One microbatch of n sequences.

    Attributes:
        rows: [n] row indices into the rollouts (CPU), prompt by prompt.
        groups: one per prompt.
        prefix_ids, prefix_positions: [1, P] int64.
        tail_ids, tail_positions: [1, Q] int64.
        tail_row: [Q] the row that each tail token belongs to.
        source: [M] for every scored token the hidden state that predicts it: j < Q that of tail token j, Q + g the last one
            of group g's prefix.
        targets: [M] the scored tokens.
        scored_row: [M] the row that each scored token belongs to.
        scored_ends: for every group the number of scored tokens up to its end.
        place: [M] where a token's log-prob goes in a flattened [n, longest] table, and ``longest``.
    """

    rows: Tensor
    groups: tuple[PackedGroup, ...]
    prefix_ids: Tensor
    prefix_positions: Tensor
    tail_ids: Tensor
    tail_positions: Tensor
    tail_row: Tensor
    source: Tensor
    targets: Tensor
    scored_row: Tensor
    scored_ends: tuple[int, ...]
    place: Tensor
    longest: int

    def by_sequence(self, values: Tensor, scored: slice = slice(None), rows: slice = slice(None)) -> Tensor:
        """[n] sums of ``values`` [M] over the scored tokens of each sequence, in their dtype; of a stretch of both, too."""
        begin, end, _ = rows.indices(len(self.rows))
        # A table and a row sum, not index_add: that one is not deterministic on CUDA.
        table = values.new_zeros((end - begin) * self.longest)
        table[self.place[scored] - begin * self.longest] = values
        return table.view(end - begin, self.longest).sum(-1)


def shared_length(tokens: Sequence[Tensor], first_scored: Sequence[int]) -> int:
    """Length of the longest common beginning of token sequences, none of which may be scored before its end."""
    limit = min(first_scored)
    if any(torch.equal(other[:limit], tokens[0][:limit]) is False for other in tokens[1:]):
        same = torch.stack([other[:limit] == tokens[0][:limit] for other in tokens]).all(0)
        return int(same.long().cumprod(0).sum())
    return limit


def pack_microbatch(
    rollouts: Rollouts, rows: Tensor, unit: Sequence[int], device: torch.device, *, share: bool
) -> PackedLayout:
    """Lay out whole prompts.

    Args:
        rollouts: the sequences.
        rows: [n] row indices, those of one prompt next to one another.
        unit: [n] unit of every row.
        device: where the forward runs.
        share: whether what the responses of a prompt begin with is taken out; otherwise prefixes are empty.
    """
    on = rollouts.attention_mask.device
    attention, ids, loss = (
        t[rows.to(on)].cpu() for t in (rollouts.attention_mask, rollouts.input_ids, rollouts.loss_mask)
    )
    real = [row == 1 for row in attention]
    tokens = [row[keep] for row, keep in zip(ids, real, strict=True)]
    scored = [(row[keep] == 1).nonzero().flatten() for row, keep in zip(loss, real, strict=True)]
    prompts = rollouts.prompt_index[rows].tolist()
    groups: list[PackedGroup] = []
    prefixes: list[Tensor] = []
    tails: list[Tensor] = []
    first_positions: list[int] = []
    source: list[Tensor] = []
    n_prefix = n_tail = 0
    spans: list[tuple[int, int]] = []  # of rows
    for row, prompt in enumerate(prompts):
        if row and prompts[row - 1] == prompt:
            spans[-1] = (spans[-1][0], row + 1)
        else:
            spans.append((row, row + 1))
    pending: list[tuple[int, Tensor, int, int]] = []  # scored positions, shared length, group, first tail token
    for number, (begin, end) in enumerate(spans):
        own = range(begin, end)
        length = shared_length([tokens[r] for r in own], [int(scored[r][0]) for r in own]) if share else 0
        prefixes.append(tokens[begin][:length])
        places = []
        for row in own:
            last = int(scored[row][-1])
            tail = tokens[row][length:last]
            tails.append(tail)
            first_positions.append(length)
            places.append((n_tail, n_tail + len(tail)))
            pending.append((length, scored[row], number, n_tail))
            n_tail += len(tail)
        groups.append(PackedGroup(unit[begin], (begin, end), (n_prefix, n_prefix + length), tuple(places)))
        n_prefix += length
    for length, positions, number, first in pending:
        index = positions - 1 - length + first
        # The token right after the prefix is predicted by the prefix.
        source.append(torch.where(positions == length, n_tail + number, index))
    longest = max(len(s) for s in scored)
    counts = torch.tensor([len(s) for s in scored])
    ends = counts.cumsum(0)
    place = [torch.arange(len(s)) + r * longest for r, s in enumerate(scored)]

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).to(device)

    return PackedLayout(
        rows=rows,
        groups=tuple(groups),
        prefix_ids=joined(prefixes)[None],
        prefix_positions=joined([torch.arange(len(p)) for p in prefixes])[None],
        tail_ids=joined(tails)[None],
        tail_positions=joined([at + torch.arange(len(t)) for at, t in zip(first_positions, tails, strict=True)])[None],
        tail_row=joined([torch.full((len(t),), r) for r, t in enumerate(tails)]),
        source=joined(source),
        targets=joined([t[s] for t, s in zip(tokens, scored, strict=True)]),
        scored_row=torch.repeat_interleave(torch.arange(len(scored)), counts).to(device),
        scored_ends=tuple(int(ends[end - 1]) for _, end in spans),
        place=joined(place),
        longest=longest,
    )
