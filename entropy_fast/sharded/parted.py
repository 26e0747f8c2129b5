"""Gradients on their way from the ranks that find them to the ranks that keep them, a layer at a time.

Legend: R ranks, P trained elements, U units of a group, C columns, e bytes of an element.

Of every trained matrix a rank keeps the rows that FSDP2 has given it: their sums, the gradients of all units in them, and the
optimizer's state; a vector is one rank's. That is P/R elements of each. A rank that goes through a group of units has, once a
backward has left a layer, U gradients of that layer in each column that the backward is of, C at the most. It hands them over
before the next layer's are formed, (R - 1)/R of them to others; and so what belongs to no layer (embeddings, an output layer, a
last norm). Of a tied embedding that is twice a backward: once as the output layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fast.distributed.team import Team
from entropy_fast.sharded.forms import Form
from entropy_fast.sharded.rounds import Rounds

__all__ = ["Arrive", "Gradients", "PartedSums"]

# Numbers of units, and by column their gradients ``[units, *shape]`` by name of a parameter; no numbers where they are a sum.
Arrive = Callable[[list[int], Sequence[Mapping[str, Tensor]]], None]


class Gradients(Protocol):
    """Gradients of the units of a group, as its backwards go on."""

    @property
    def columns(self) -> Sequence[Mapping[str, Tensor]]:
        """By column and name ``[units, *shape]``, of the parameters that signals have come for."""

    def take(self, name: str) -> list[Tensor | None]:
        """By column those of a parameter, which begin anew; None where no signal has come since."""


class PartedSums:
    """Who keeps what of a model's gradients, and how it gets there.

    Args:
        team: the ranks.
        rounds: of these ranks.
        forms: of all trained parameters, in their order (`dealt_forms`).
        n_layers: how many layers there are.

    Attributes:
        forms: the same.
        dealt: places of the parameters that every rank keeps something of.
        handed_over: whether some of the group's gradients have gone already.
    """

    def __init__(self, team: Team, rounds: Rounds, forms: Sequence[Form], n_layers: int) -> None:
        self._team, self._rounds, self.forms, self._rest = team, rounds, tuple(forms), n_layers
        self.dealt = tuple(
            tuple(place for place, form in enumerate(forms) if form.elements(rank)) for rank in range(team.size)
        )
        self._layer = {form.name: form.layer for form in forms}
        self._of_layer = [
            [place for place, form in enumerate(forms) if form.layer == layer] for layer in range(n_layers + 1)
        ]
        self._first = rounds.offer(n_layers + 1, self._pass_on)
        self._source: Gradients | None = None
        self._numbers: list[int] = []
        self._arrive: Arrive | None = None
        self._together = False
        self._waiting: dict[int, list[dict[str, Tensor]]] = {}  # by rank, of a group that is not complete
        self._outgoing: dict[int, list[Tensor | None]] = {}  # by place and column
        self.handed_over = False

    @property
    def places(self) -> tuple[int, ...]:
        """Of the parameters that this rank keeps something of."""
        return self.dealt[self._team.rank]

    @property
    def most_bytes(self) -> int:
        """Of a gradient, on the rank that keeps most of it."""
        return max(
            sum(form.elements(rank) * form.dtype.itemsize for form in self.forms) for rank in range(self._team.size)
        )

    def cut(self, place: int, tensor: Tensor) -> Tensor:
        """What this rank keeps of ``[*shape]`` of a parameter."""
        return self.forms[place].cut(tensor, self._team.rank)

    @contextlib.contextmanager
    def arriving(self, arrive: Arrive, *, together: bool) -> Iterator[None]:
        """For a sweep of all ranks: ``arrive`` is given what comes for what this rank keeps, from itself too.

        Args:
            arrive: called with gradients of some parameters; more of the same units may come later, to be added.
            together: whether units are to come once, complete, with all parameters. They wait here until then.
        """
        self._arrive, self._together = arrive, together
        try:
            yield
            self._team.meet()  # whose sweep is over has to be there until all are
        finally:
            self._arrive, self._source = None, None
            self._waiting.clear()

    def begin(self, source: Gradients, numbers: Sequence[int]) -> None:
        """From here on gradients of a group of units come from a source; no numbers where only their sum is wanted."""
        self._source, self._numbers, self.handed_over = source, list(numbers), False

    def entering(self, layer: int) -> None:
        """A layer is next: hand over what was left behind elsewhere."""
        if self._source is not None:
            self._send_all_but(layer)

    def end(self) -> None:
        """The group is complete: hand over the rest."""
        self._send_all_but(self._rest)
        self._send(self._rest, complete=True)
        self._source = None

    def _send_all_but(self, layer: int) -> None:
        assert self._source is not None
        there = {self._layer[name] for own in self._source.columns for name in own} - {layer}
        for other in sorted(there, reverse=True):
            self._send(other)

    def _send(self, layer: int, *, complete: bool = False) -> None:
        assert self._source is not None
        found = {place: self._source.take(self.forms[place].name) for place in self._of_layer[layer]}
        self._outgoing = {place: own for place, own in found.items() if any(g is not None for g in own)}
        if not self._numbers:
            self._outgoing = {
                place: [None if g is None else g.sum(0, keepdim=True) for g in own]
                for place, own in self._outgoing.items()
            }
        self.handed_over = True
        self._rounds.ask(self._first + layer, len(self._numbers), len(self._source.columns), int(complete))
        self._outgoing = {}

    def _pass_on(self, group: dist.ProcessGroup | None, layer: int, mine: bool, asked: Tensor) -> None:
        """All ranks: gradients of one layer from those that have asked, to those that keep them."""
        places, me, ranks = self._of_layer[layer], self._team.rank, range(self._team.size)
        parcels = self._parcels(group, places, mine, asked)
        dtype = max((self.forms[place].dtype for place in places), key=lambda d: d.itemsize, default=torch.float32)
        flat = [own for rank in ranks for own in self._flat(rank, dtype)] if mine else []
        received_from = [parcel.elements(self.forms, me) for parcel in parcels]
        received = torch.empty(sum(received_from), dtype=dtype)
        dist.all_to_all_single(
            received,
            torch.cat(flat) if flat else torch.empty(0, dtype=dtype),
            received_from,
            [parcels[me].elements(self.forms, rank) for rank in ranks],
            group=group,
        )
        for rank, (part, parcel) in enumerate(zip(torch.split(received, received_from), parcels, strict=True)):
            if parcel.rows:
                self._take_in(rank, parcel.numbers, self._read(part, parcel), complete=parcel.complete)

    def _parcels(
        self, group: dist.ProcessGroup | None, places: Sequence[int], mine: bool, asked: Tensor
    ) -> list[_Parcel]:
        """What every rank sends: how much was in its request, and whose gradients it is all say here."""
        most = max(1, int(asked[:, 0].max()))
        own = torch.full((most + len(places),), -1, dtype=torch.int64)
        if mine:
            own[: len(self._numbers)] = torch.tensor(self._numbers, dtype=torch.int64)
            given = [self._outgoing.get(place, []) for place in places]
            masks = [sum(1 << c for c, g in enumerate(found) if g is not None) for found in given]
            own[most:] = torch.tensor(masks, dtype=torch.int64)
        heads = [torch.empty_like(own) for _ in range(self._team.size)]
        dist.all_gather(heads, own, group=group)
        found = []
        for head, (units, n_columns, complete, *_) in zip(heads, asked.tolist(), strict=True):
            masks = head[most:].tolist()
            columns = {
                place: tuple(c for c in range(n_columns) if mask >> c & 1)
                for place, mask in zip(places, masks, strict=True)
                if mask > 0
            }
            rows = max(1, units) if units >= 0 else 0
            found.append(_Parcel(head[: max(0, units)].tolist(), rows, columns, n_columns, complete=complete > 0))
        return found

    def _flat(self, rank: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """For a rank, in the order of parameters and columns."""
        for place, found in self._outgoing.items():
            for own in found:
                if own is not None:
                    yield self.forms[place].cut_units(own, rank).to(device="cpu", dtype=dtype).reshape(-1)

    def _read(self, part: Tensor, parcel: _Parcel) -> list[dict[str, Tensor]]:
        """By column and name, what this rank keeps of the parameters that signals have come for."""
        found: list[dict[str, Tensor]] = [{} for _ in range(parcel.n_columns)]
        start = 0
        for place, columns in parcel.columns.items():
            form = self.forms[place]
            shape = form.piece(self._team.rank)
            for column in columns if shape.numel() else ():
                stop = start + parcel.rows * shape.numel()
                found[column][form.name] = part[start:stop].view(parcel.rows, *shape).to(form.dtype)
                start = stop
        return found

    def _take_in(self, rank: int, numbers: list[int], found: list[dict[str, Tensor]], *, complete: bool) -> None:
        assert self._arrive is not None
        if not self._together:
            self._arrive(numbers, found)
            return
        waiting = self._waiting.setdefault(rank, [{} for _ in found])
        for before, own in zip(waiting, found, strict=True):
            for name, rows in own.items():
                before[name] = before[name] + rows if name in before else rows
        if complete:
            self._arrive(numbers, _in_all_columns(self._waiting.pop(rank)))


@dataclasses.dataclass(frozen=True)
class _Parcel:
    """What a rank sends of a layer.

    Attributes:
        numbers: of the units whose gradients it is; none for a sum over them.
        rows: as many, or 1 for their sum; 0 where the rank sends nothing.
        columns: by place of a parameter those that signals have come for.
        n_columns: that there are.
        complete: whether nothing more comes of these units.
    """

    numbers: list[int]
    rows: int
    columns: Mapping[int, tuple[int, ...]]
    n_columns: int
    complete: bool

    def elements(self, forms: Sequence[Form], rank: int) -> int:
        """That go to a rank."""
        return sum(self.rows * len(columns) * forms[place].elements(rank) for place, columns in self.columns.items())


def _in_all_columns(found: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """A parameter that one column has is in all of them, as where nothing was sent."""
    like = {name: rows for own in found for name, rows in own.items()}
    return [{name: own.get(name, torch.zeros_like(rows)) for name, rows in like.items()} for own in found]
