"""What ranks do with one another in the midst of their sweeps, without a model; started by `process_groups.run_jobs`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_fast.distributed.team import joined
from entropy_fast.sharded.forms import Form, dealt_forms
from entropy_fast.sharded.parted import PartedSums
from entropy_fast.sharded.rounds import Rounds

SHAPES = [(3, 4), (5,), (2, 2), (7,), (4, 3), (1,), (6, 2)]
LAYERS = [0, 0, 1, 1, 2, 2, 3]  # the last one is in none
COLUMNS = 3
GROUPS: list[list[list[int]]] = [[[0, 1], [2]], [], [[3], [4, 5, 6], [7]]]  # by rank
SKIPPED = {2: 2}  # by the first unit of a group, a parameter that no signal comes for


def asking(rank: int) -> dict[str, Any]:
    """Every rank asks for things of its own, as often as its number; what is done, and who had asked for it."""
    done: list[list[Any]] = []
    with joined("all", 20.0) as team:
        rounds = Rounds(team)

        def act(kind: str) -> Any:
            return lambda group, thing, mine, asked: done.append([kind, thing, mine, asked.tolist()])

        first, second = rounds.offer(2, act("first")), rounds.offer(3, act("second"))
        wanted = [[], [second + 2, first], [first, second + 2, first + 1, first + 1]][rank]
        with team.serving(rounds.serve):
            for thing in wanted:
                rounds.ask(thing, rank, 10 + rank)
            team.meet()
    return {"done": done, "wanted": wanted, "firsts": [first, second]}


class Found:
    """Gradients of a group of units, as a recorder has them; no two of them are alike."""

    def __init__(self, numbers: list[int], skipped: int) -> None:
        self.columns: list[dict[str, Tensor]] = [{} for _ in range(COLUMNS)]
        self._given: dict[str, set[int]] = {}
        self._numbers, self._skipped = numbers, skipped

    def backward(self, parted: PartedSums, columns: list[int]) -> None:
        """From the output to the first layer, for some of the columns."""
        for layer in (3, 2, 1, 0):
            if layer < 3:
                parted.entering(layer)
            for place in (place for place, own in enumerate(LAYERS) if own == layer and place != self._skipped):
                for column in range(COLUMNS):
                    there = self.columns[column].setdefault(
                        str(place), torch.zeros(len(self._numbers), *SHAPES[place]).double()
                    )
                    if column in columns:
                        there += torch.stack([gradient_of(number, column, place) for number in self._numbers])
                self._given.setdefault(str(place), set()).update(columns)

    def take(self, name: str) -> list[Tensor | None]:
        given = self._given.pop(name, set())
        found = [store.pop(name, None) for store in self.columns]
        return [own if column in given else None for column, own in enumerate(found)]


def gradient_of(unit: int, column: int, place: int) -> Tensor:
    base = torch.arange(1, 1 + torch.Size(SHAPES[place]).numel(), dtype=torch.float64).view(SHAPES[place])
    return base * (1 + unit) + 1000 * place + 100 * column


def handing_over(rank: int, sums: bool, together: bool) -> dict[str, Any]:
    """Ranks with groups of units of their own, one with none: what arrives, by unit, column and parameter, and how often."""
    total: dict[str, Any] = {}
    calls: list[list[int]] = []
    with joined("all", 20.0) as team:
        shapes = enumerate(zip(SHAPES, LAYERS, strict=True))
        forms = [Form(str(place), torch.Size(shape), torch.float64, layer) for place, (shape, layer) in shapes]
        rounds = Rounds(team)
        parted = PartedSums(team, rounds, dealt_forms(forms, team.size), 3)

        def arrive(numbers: list[int], columns: Any) -> None:
            calls.append(numbers)
            for column, own in enumerate(columns):
                for name, rows in own.items():
                    for number, row in zip(numbers or [-1], rows, strict=True):
                        key = f"{number}/{column}/{name}"
                        total[key] = total.get(key, 0) + row

        with team.serving(rounds.serve), parted.arriving(arrive, together=together):
            for numbers in GROUPS[rank]:
                source = Found(numbers, SKIPPED.get(numbers[0], -1))
                parted.begin(source, [] if sums else numbers)
                source.backward(parted, [0])
                source.backward(parted, [1, 2])
                parted.end()
    kept = {
        str(place): [parted.forms[place].rows[rank].start, parted.forms[place].rows[rank].stop]
        for place in parted.places
    }
    return {"kept": kept, "total": {key: own.tolist() for key, own in total.items()}, "calls": calls}
