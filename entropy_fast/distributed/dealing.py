"""Who goes through what: units of a batch, dealt to ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.distributed.collectives import add_up
from entropy_fast.distributed.team import Team
from entropy_fast.rollouts import Rollouts

__all__ = ["Share", "deal", "share_of"]


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of the units of every rank, ascending: the most costly first, each to whoever has the least so far.

    The same wherever it is called: ties go to the lower unit and the lower rank.

    Args:
        costs: of every unit.
        ranks: how many.
    """
    loads = [0] * ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = loads.index(min(loads))
        parts[rank].append(number)
        loads[rank] += costs[number]
    return [sorted(part) for part in parts]


@dataclasses.dataclass(frozen=True)
class Share:
    """The units of a batch that this rank goes through; all of them where it works alone.

    Attributes:
        team: the ranks.
        rollouts: the batch, whole.
        every: prompts of every unit of the batch.
        dealt: numbers of the units of every rank.
    """

    team: Team
    rollouts: Rollouts
    every: list[list[int]]
    dealt: list[list[int]]

    @property
    def numbers(self) -> list[int]:
        """Of the units of this rank, ascending."""
        return self.dealt[self.team.rank]

    @property
    def units(self) -> list[list[int]]:
        """Prompts of the units of this rank."""
        return [self.every[number] for number in self.numbers]

    @property
    def prompts(self) -> list[int]:
        """Of the units of this rank."""
        return [prompt for unit in self.units for prompt in unit]

    @property
    def most(self) -> int:
        """Units of the rank that has most."""
        return max(map(len, self.dealt))

    @property
    def sizes(self) -> Tensor:
        """[units] prompts of every unit of the batch."""
        return torch.tensor([len(unit) for unit in self.every])

    def rows(self) -> Tensor:
        """[n] rows of the batch that this rank goes through."""
        own = [self.rollouts.rows_of_prompt(prompt) for prompt in self.prompts]
        return torch.cat(own) if own else torch.zeros(0, dtype=torch.int64)

    def fill(self, tables: Sequence[Tensor]) -> None:
        """Complete tables ``[N, ...]`` of sequences in place: every row is known to the rank that went through it."""
        if self.team.size == 1:
            return
        others = torch.ones(self.rollouts.n_sequences, dtype=torch.bool)
        others[self.rows()] = False
        for table in tables:
            table[others.to(table.device)] = 0
        add_up(self.team, tables)


def share_of(team: Team, rollouts: Rollouts, units: list[list[int]]) -> Share:
    """Units dealt by their tokens.

    Args:
        team: the ranks, which hold the same batch.
        rollouts: the batch.
        units: prompts of every unit.
    """
    if team.size == 1:
        return Share(team, rollouts, units, [list(range(len(units)))])
    tokens = torch.zeros(rollouts.n_prompts, dtype=torch.int64)
    tokens.index_add_(0, rollouts.prompt_index, rollouts.attention_mask.sum(-1).cpu().long())
    return Share(team, rollouts, units, deal([int(tokens[unit].sum()) for unit in units], team.size))
