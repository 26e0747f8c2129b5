"""What a rank has of gradients once a sweep is done: all parameters of its own units, or all units of its own elements.

Either way the numbers of a result are sums over ranks, each taken once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.distributed.collectives import add_up
from entropy_fast.distributed.dealing import Share
from entropy_fast.distributed.team import Team

__all__ = ["Layout"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How gradients lie on ranks.

    Attributes:
        team: the ranks.
        dealt: places of the parameters that every rank has elements of, with the gradients of all units; None where every rank
            has all parameters, with the gradients of its own units.
        parameters: how many there are.
    """

    team: Team
    dealt: tuple[tuple[int, ...], ...] | None = None
    parameters: int = 0

    def units(self, share: Share) -> list[int]:
        """Numbers of the units that this rank has gradients of."""
        return share.numbers if self.dealt is None else list(range(len(share.every)))

    def add_units(self, tensors: Sequence[Tensor]) -> None:
        """Sums over the units that this rank has become those over all, in place.

        Raises:
            DistributedError: a rank was lost.
        """
        if self.dealt is None:
            add_up(self.team, tensors)

    def add_parameters(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the elements that this rank has become those over all.

        Raises:
            DistributedError: a rank was lost.
        """
        if self.dealt is None:
            return list(numbers)
        table = torch.tensor(list(numbers), dtype=torch.float64)
        add_up(self.team, [table])
        found: list[float] = table.tolist()
        return found

    def of_all_parameters(self, own: Tensor) -> Tensor:
        """``[parameters, ...]`` sums over all elements of a parameter from ``[own, ...]`` over those of this rank, on the CPU.

        Raises:
            DistributedError: a rank was lost.
        """
        if self.dealt is None:
            return own
        found = torch.zeros(self.parameters, *own.shape[1:], dtype=own.dtype)
        found[list(self.dealt[self.team.rank])] = own
        add_up(self.team, [found])
        return found

    def complete(self, own: Tensor) -> Tensor:
        """``[parameters, units, ...]`` of everything, from what this rank has; 0 there for other ranks' units.

        Raises:
            DistributedError: a rank was lost.
        """
        self.add_units([own])
        return self.of_all_parameters(own)
