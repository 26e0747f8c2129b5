"""Where sequences stand in a packed row: as a table, and as groups that are padded to the longest of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.ways.packed.layout import PackedGroup
from entropy_fast.ways.packed.scores import causal_mask

__all__ = ["AttentionGroups", "GroupPart"]

Span = tuple[int, int]


class AttentionGroups:
    """Where the sequences of every group stand in the packed row, and the masks between them.

    Args:
        groups: of the layout.
        tails: whether the packed row is that of the tails; otherwise that of the prefixes, one sequence a group.
        device: of the row.
        copies: columns of weights (0, 1 and so on) for each of which all prefixes stand behind the tails once more, in the same
            row. Tails then continue from the first copy, and what goes back to a prefix goes to every copy with the weights of
            its column.

    Attributes:
        copies: the same.
    """

    def __init__(
        self, groups: Sequence[PackedGroup], *, tails: bool, device: torch.device, copies: Sequence[int] = ()
    ) -> None:
        assert tails or not copies
        self.device = device
        self.copies = tuple(copies)
        self._masks: dict[tuple[int, int, int, int | None, torch.dtype], Tensor] = {}
        self._n_tail, self._n_prefix = groups[-1].tail_span[1], groups[-1].prefix[1]
        alone = [dataclasses.replace(group, prefix=(0, 0)) for group in groups]
        self._spans: list[tuple[PackedGroup, tuple[Span, ...]]] = []
        if tails:
            self._spans += [(group, group.tails) for group in groups]
        for span in [self.copy(place) for place in range(len(copies))] if tails else [slice(0, None)]:
            self._spans += [
                (one, ((span.start + group.prefix[0], span.start + group.prefix[1]),))
                for one, group in zip(alone, groups, strict=True)
            ]

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

    @functools.cached_property
    def sequences(self) -> Tensor:
        """[S, 5] int64: span and prefix of every sequence that has a token, and its row of the microbatch."""
        found = [
            (begin, end, *group.prefix, row)
            for group, spans in self._spans
            for row, (begin, end) in enumerate(spans, group.rows[0])
            if begin < end
        ]
        return torch.tensor(found, dtype=torch.int64).view(len(found), 5)

    @functools.cached_property
    def each(self) -> Tensor:
        """[S + 1] bounds of runs of one of the ``sequences``."""
        return torch.arange(len(self.sequences) + 1)

    @functools.cached_property
    def by_prefix(self) -> Tensor:
        """[R + 1] bounds of runs of ``sequences`` that have one prefix; those that have none are by themselves."""
        prefixes = [tuple(prefix) for prefix in self.sequences[:, 2:4].tolist()]
        new = [i for i, (one, two) in enumerate(itertools.pairwise(prefixes), 1) if one != two or two[0] == two[1]]
        return torch.tensor([0, *new, len(prefixes)] if prefixes else [0])

    @functools.cached_property
    def parts(self) -> list[GroupPart]:
        """The groups that have a token."""
        return [GroupPart.of(group, own, self.device) for group, own in self._spans if any(b < e for b, e in own)]

    def mask(self, prefix: int, width: int, repeat: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`causal_mask`, made once for each shape."""
        key = (prefix, width, repeat, window, dtype)
        if key not in self._masks:
            self._masks[key] = causal_mask(prefix, width, repeat, window, dtype, self.device)
        return self._masks[key]


@dataclasses.dataclass(frozen=True)
class GroupPart:
    """A group with at least one token: its span, the padded width, and the indices between the two forms."""

    group: PackedGroup
    begin: int
    end: int
    width: int
    places: Tensor | None  # [G * width] into the span; None where all sequences have the same length
    kept: Tensor | None  # [tokens] into G * width

    @classmethod
    def of(cls, group: PackedGroup, spans: Sequence[tuple[int, int]], device: torch.device) -> GroupPart:
        """The group whose sequences have these spans, one behind the other."""
        lengths = [end - begin for begin, end in spans]
        begin, end, width = spans[0][0], spans[-1][1], max(lengths)
        if all(length == width for length in lengths):
            return cls(group, begin, end, width, None, None)
        places = [(first - begin + torch.arange(width)).clamp(max=sum(lengths) - 1) for first, _ in spans]
        kept = [torch.arange(length) + row * width for row, length in enumerate(lengths)]
        return cls(group, begin, end, width, torch.cat(places).to(device), torch.cat(kept).to(device))

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
