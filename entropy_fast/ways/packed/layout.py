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
    rows_of = _Tokens.of(rollouts, rows)
    groups: list[PackedGroup] = []
    prefixes: list[Tensor] = []
    tails: list[Tensor] = []
    first_positions: list[int] = []
    sources: list[tuple[int, Tensor, int, int]] = []  # shared length, scored positions, group, first tail token
    n_prefix = n_tail = 0
    for number, (begin, end) in enumerate(_spans_of_prompts(rollouts.prompt_index[rows].tolist())):
        own = range(begin, end)
        first_scored = [int(rows_of.scored[row][0]) for row in own]
        length = shared_length([rows_of.tokens[row] for row in own], first_scored) if share else 0
        prefixes.append(rows_of.tokens[begin][:length])
        places = []
        for row in own:
            # The last token predicts nothing.
            tail = rows_of.tokens[row][length : int(rows_of.scored[row][-1])]
            tails.append(tail)
            first_positions.append(length)
            places.append((n_tail, n_tail + len(tail)))
            sources.append((length, rows_of.scored[row], number, n_tail))
            n_tail += len(tail)
        groups.append(PackedGroup(unit[begin], (begin, end), (n_prefix, n_prefix + length), tuple(places)))
        n_prefix += length
    # The token right after the prefix is predicted by the prefix.
    source = [
        torch.where(positions == length, n_tail + number, positions - 1 - length + first)
        for length, positions, number, first in sources
    ]
    counts = torch.tensor([len(scored) for scored in rows_of.scored])
    longest, ends = int(counts.max()), counts.cumsum(0)

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
        targets=joined([t[s] for t, s in zip(rows_of.tokens, rows_of.scored, strict=True)]),
        scored_row=torch.repeat_interleave(torch.arange(len(counts)), counts).to(device),
        scored_ends=tuple(int(ends[group.rows[1] - 1]) for group in groups),
        place=joined([torch.arange(int(count)) + r * longest for r, count in enumerate(counts)]),
        longest=longest,
    )


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The real tokens of every row, and the positions among them of those that are scored; on the CPU."""

    tokens: list[Tensor]
    scored: list[Tensor]

    @classmethod
    def of(cls, rollouts: Rollouts, rows: Tensor) -> _Tokens:
        on = rollouts.attention_mask.device
        attention, ids, loss = (
            t[rows.to(on)].cpu() for t in (rollouts.attention_mask, rollouts.input_ids, rollouts.loss_mask)
        )
        real = [row == 1 for row in attention]
        tokens = [row[keep] for row, keep in zip(ids, real, strict=True)]
        scored = [(row[keep] == 1).nonzero().flatten() for row, keep in zip(loss, real, strict=True)]
        return cls(tokens, scored)


def _spans_of_prompts(prompts: Sequence[int]) -> list[Span]:
    """Of the rows of every prompt, which stand next to one another."""
    spans: list[Span] = []
    for row, prompt in enumerate(prompts):
        if row and prompts[row - 1] == prompt:
            spans[-1] = (spans[-1][0], row + 1)
        else:
            spans.append((row, row + 1))
    return spans
