"""Frozen matrices of layers, whole only while a forward or a backward is at their layer.

Ranks go through their own prompts and come to a layer at different times, if at all. Who needs one says so; all ranks hear that
at their own next layer, or where they wait for the others after a sweep, and gather it together, until nobody needs any. So no
two ranks have to do the same number of forwards, and none waits for one that has failed.

What stands in a layer's place meanwhile has its shape and is NaN: whoever reads it out of turn does not get a number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entropy_fast.distributed.team import Team
from entropy_fast.sharded.fsdp2 import ShardedParameter

__all__ = ["LayersOnDemand", "of_outputs"]

_AT_ONCE = 2  # layers that are whole on a rank: the one that is run, and the one before
_NOBODY = -1


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
        found = cls(sharded, nn.Parameter(_nothing(whole), requires_grad=False), whole)
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
    """The frozen matrices of some modules.

    Args:
        team: the ranks.
        layers: parameters by module; the same modules in the same order on all ranks.
    """

    def __init__(self, team: Team, layers: Mapping[nn.Module, Sequence[ShardedParameter]]) -> None:
        self._team = team
        self._number = {id(module): number for number, module in enumerate(layers)}
        self._layers = [[_Lent.of(own) for own in parameters] for parameters in layers.values()]
        self._there: list[int] = []  # numbers of layers that are whole, the last one last

    @property
    def stand_ins(self) -> dict[int, nn.Parameter]:
        """What forwards see, by the identity of the sharded parameter."""
        return {id(own.sharded.tensor): own.stand_in for layer in self._layers for own in layer}

    def before(self, module: nn.Module) -> Callable[[], None] | None:
        """What is to be called before a module's forward or backward; None where nothing is."""
        number = self._number.get(id(module))
        return None if number is None else lambda: self._have(number)

    def serve(self) -> None:
        """Gather with others what they need, until nobody needs any."""
        while self._together(_NOBODY) != _NOBODY:
            pass

    def _have(self, number: int) -> None:
        if number in self._there:
            self._there.remove(number)
        else:
            while len(self._there) >= _AT_ONCE:
                for own in self._layers[self._there.pop(0)]:
                    own.free()
            while self._together(number) != number:
                pass
        self._there.append(number)

    def _together(self, number: int) -> int:
        """Say which layer this rank needs, and gather with all of them one that somebody does; which that was."""
        taken = [_NOBODY]

        def gather(group: dist.ProcessGroup | None) -> None:
            needed = [torch.empty(1, dtype=torch.int64) for _ in range(self._team.size)]
            dist.all_gather(needed, torch.tensor([number]), group=group)
            # The same on all ranks. Who is behind is waited for at the layers that are still to come.
            taken[0] = min((int(other) for other in needed if int(other) != _NOBODY), default=_NOBODY)
            for own in self._layers[taken[0]] if taken[0] != _NOBODY else ():
                values = own.gathered()
                if taken[0] == number:
                    own.fill(values)

        with torch.no_grad():
            self._team.run_between(gather)
        return taken[0]


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
