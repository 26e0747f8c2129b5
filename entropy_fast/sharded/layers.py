"""Matrices of layers, whole only while a forward or a backward is at their layer.

Who comes to a layer asks for it (`sharded.rounds`), and all ranks gather it together. What stands in a layer's place meanwhile
has its shape and is NaN: whoever reads it out of turn does not get a number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entropy_fast.sharded.fsdp2 import ShardedParameter
from entropy_fast.sharded.rounds import Rounds

__all__ = ["LayersOnDemand", "of_outputs"]

_AT_ONCE = 2  # layers that are whole on a rank: the one that is run, and the one before


@dataclasses.dataclass(frozen=True)
class _Lent:
    """A parameter that comes and goes.

    Attributes:
        sharded: what this rank has of it.
        stand_in: what forwards see.
        whole: its values, while its memory is there. The memory comes back to the same place: graphs refer to it.
    """

    sharded: ShardedParameter
    stand_in: nn.Parameter
    whole: Tensor

    @classmethod
    def of(cls, sharded: ShardedParameter) -> _Lent:
        whole = torch.empty(sharded.tensor.shape, dtype=sharded.computed_in, device=sharded.tensor.device)
        stand_in = nn.Parameter(_nothing(whole), requires_grad=sharded.tensor.requires_grad)
        found = cls(sharded, stand_in, whole)
        found.free()
        return found

    def gathered(self) -> Tensor:
        local: Any = self.sharded.tensor.detach().to(self.sharded.computed_in)
        values: Tensor = local.full_tensor()
        return values

    def fill(self, values: Tensor) -> None:
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
        self.whole.copy_(values)
        self.stand_in.data = self.whole

    def free(self) -> None:
        self.stand_in.data = _nothing(self.whole)
        self.whole.untyped_storage().resize_(0)


class LayersOnDemand:
    """Matrices of some modules, frozen and trained ones.

    Args:
        rounds: of the ranks.
        layers: parameters by module; the same modules in the same order on all ranks.
    """

    def __init__(self, rounds: Rounds, layers: Mapping[nn.Module, Sequence[ShardedParameter]]) -> None:
        self._rounds = rounds
        self._number = {id(module): number for number, module in enumerate(layers)}
        self._layers = [[_Lent.of(own) for own in parameters] for parameters in layers.values()]
        self._there: list[int] = []  # numbers of layers that are whole, the last one last
        self._entering: Callable[[int], None] = lambda number: None
        self._first = rounds.offer(len(self._layers), self._gather)

    @property
    def stand_ins(self) -> dict[int, nn.Parameter]:
        """What forwards see, by the identity of the sharded parameter."""
        return {id(own.sharded.tensor): own.stand_in for layer in self._layers for own in layer}

    def tell(self, entering: Callable[[int], None]) -> None:
        """Have it told, by its number, which layer is next whenever a forward or a backward comes to one."""
        self._entering = entering

    def before(self, module: nn.Module) -> Callable[[], None] | None:
        """What is to be called before a module's forward or backward; None where nothing is."""
        number = self._number.get(id(module))
        return None if number is None else lambda: self._have(number)

    def _have(self, number: int) -> None:
        self._entering(number)
        if number in self._there:
            self._there.remove(number)
        else:
            while len(self._there) >= _AT_ONCE:
                for own in self._layers[self._there.pop(0)]:
                    own.free()
            self._rounds.ask(self._first + number)
        self._there.append(number)

    def _gather(self, group: dist.ProcessGroup | None, number: int, mine: bool, asked: Tensor) -> None:
        """All ranks: a layer that somebody needs."""
        for own in self._layers[number]:
            values = own.gathered()
            if mine:
                own.fill(values)


def of_outputs(found: object) -> Iterator[Tensor]:
    """The tensors that a module returned and that a backward will come through."""
    if isinstance(found, Tensor):
        if found.requires_grad:
            yield found
    elif isinstance(found, Mapping):
        for own in found.values():
            yield from of_outputs(own)
    elif isinstance(found, (tuple, list)):
        for own in found:
            yield from of_outputs(own)


def _nothing(like: Tensor) -> Tensor:
    return torch.full((), math.nan, dtype=like.dtype, device=like.device).expand(like.shape)
