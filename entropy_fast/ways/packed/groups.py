"""Where the sequences of every group stand in a packed row, as attention wants to know it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.ops.attention_inputs import PackedSequences
from entropy_fast.ways.packed.layout import PackedGroup

__all__ = ["AttentionGroups"]


class AttentionGroups:
    """The sequences of a packed row, and copies of the prefixes among them.

    Args:
        groups: of the layout.
        tails: whether the packed row is that of the tails; otherwise that of the prefixes, one sequence a group.
        copies: columns of weights (0, 1 and so on) for each of which all prefixes stand behind the tails once more, in the same
            row. Tails then continue from the first copy, and what goes back to a prefix goes to every copy with the weights of
            its column.

    Attributes:
        copies: the same.
        sequences: spans, prefixes and rows of those that have a token.
    """

    def __init__(self, groups: Sequence[PackedGroup], *, tails: bool, copies: Sequence[int] = ()) -> None:
        assert tails or not copies
        self.copies = tuple(copies)
        self._n_tail, self._n_prefix = groups[-1].tail_span[1], groups[-1].prefix[1]
        found = [
            (begin, end, *group.prefix, row)
            for group in groups
            for row, (begin, end) in enumerate(group.tails, group.rows[0])
            if tails
        ]
        for start in [self.copy(place).start for place in range(len(copies))] if tails else [0]:
            found += [(start + group.prefix[0], start + group.prefix[1], 0, 0, group.rows[0]) for group in groups]
        table = [row for row in found if row[0] < row[1]]
        self.sequences = PackedSequences(torch.tensor(table, dtype=torch.int64).view(len(table), 5))

    def copy(self, place: int) -> slice:
        """Where the prefixes of a copy stand."""
        begin = self._n_tail + place * self._n_prefix
        return slice(begin, begin + self._n_prefix)

    def add_to_copies(self, gradient: Tensor, cotangents: Tensor, scales: Tensor) -> None:
        """Add what came back to the prefixes.

        Args:
            gradient: [N, key heads, D] of keys or values.
            cotangents: [C, key heads, P, D] by column.
            scales: [C, P] that they are multiplied by.
        """
        for place, column in enumerate(self.copies):
            scaled = cotangents[column] * scales[column, :, None].to(cotangents.dtype)
            gradient[self.copy(place)] += scaled.transpose(0, 1).to(gradient.dtype)
