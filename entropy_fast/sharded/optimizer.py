"""An optimizer of sharded parameters as one of whole parameters, for forecasts of its step."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from entropy_fast.distributed.agreement import fingerprint
from entropy_fast.distributed.team import Team
from entropy_fast.errors import OptimizerStateError
from entropy_fast.sharded.fsdp2 import ShardedModel, is_sharded
from entropy_fast.sharded.gathering import gathered
from entropy_fast.step import AdamState, GivenOptimizer, OptimizerAtHand, read_optimizer
from entropy_fast.step.adam_state import innermost
from entropy_fast.step.joined import bare_copy, kind_name
from entropy_fast.step.optimizer_file import is_adams

__all__ = ["ShardedOptimizer", "StandIns", "exchanged", "left_out", "sharded_optimizer"]

_IN_CLOSED_FORM = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_FIRST_MOMENTS = ("exp_avg",)  # of Adam, which its static geometry does without


@dataclasses.dataclass(frozen=True)
class StandIns:
    """Whole parameters, by the identity of the sharded ones.

    Attributes:
        stepped: as the optimizer knows those that are trained.
        computed: as forwards see them; the same objects where nothing is cast.
    """

    stepped: Mapping[int, nn.Parameter]
    computed: Mapping[int, nn.Parameter]

    def by_name(self, model: nn.Module) -> dict[str, Tensor]:
        """As the optimizer knows them, once forwards see them in this model."""
        places = {id(own): key for key, own in self.computed.items()}
        named = ((name, places.get(id(p))) for name, p in model.named_parameters())
        return {name: self.stepped[key] for name, key in named if key is not None and key in self.stepped}

    @property
    def cast(self) -> bool:
        """Whether some are stepped in another dtype than they are computed in."""
        return any(own is not self.computed[key] for key, own in self.stepped.items())


@dataclasses.dataclass(frozen=True)
class ShardedOptimizer:
    """An optimizer as it was given.

    Attributes:
        given: a file, a state, or a live optimizer without wrappers.
        names: of sharded parameters, by identity.
    """

    given: str | os.PathLike[str] | AdamState | torch.optim.Optimizer
    names: Mapping[int, str]

    @property
    def form(self) -> str:
        """A hash of what is sharded of it."""
        if not isinstance(self.given, torch.optim.Optimizer):
            return ""
        return fingerprint(
            [
                [
                    self.names[id(p)],
                    sorted((key, is_sharded(value)) for key, value in self.given.state.get(p, {}).items()),
                ]
                for group in self.given.param_groups
                for p in group["params"]
                if id(p) in self.names
            ]
        )

    def in_pieces(self, model: nn.Module) -> bool:
        """Whether the steps of rows of a parameter are those rows of its step.

        Args:
            model: that a file is matched with.
        """
        return not isinstance(self.given, (str, os.PathLike)) or is_adams(self.given, model)

    def of_stand_ins(
        self, stand_ins: StandIns, team: Team, *, momentum: bool
    ) -> Callable[[nn.Module], OptimizerAtHand]:
        """Gather its state, a tensor at a time.

        Args:
            stand_ins: whole parameters.
            team: the ranks, all of which have to come here.
            momentum: whether Adam's first moments are wanted.

        Returns:
            From the model, whose parameters the stand-ins are by then, the optimizer as a probe takes it.
        """
        if not isinstance(self.given, torch.optim.Optimizer):
            return functools.partial(_of_file, self.given, stand_ins)
        optimizer = self.given
        unwanted = left_out(optimizer, momentum=momentum)
        states = {
            id(p): {key: gathered(team, value) for key, value in own.items() if key not in unwanted}
            for group in optimizer.param_groups
            for p in group["params"]
            if (own := optimizer.state.get(p))
        }

        def whole(model: nn.Module) -> OptimizerAtHand:
            found = read_optimizer(exchanged(optimizer, stand_ins.computed, states), model, any_kind=True)
            if not stand_ins.cast:
                return found
            live = exchanged(optimizer, {**stand_ins.computed, **stand_ins.stepped}, states)
            return dataclasses.replace(found, live=live, values=stand_ins.by_name(model))

        return whole


def sharded_optimizer(optimizer: GivenOptimizer, sharded: ShardedModel) -> ShardedOptimizer:
    """Look at an optimizer.

    Raises:
        OptimizerStateError: it is not one that is read under sharding.
    """
    names = {id(own.tensor): own.name for own in sharded.parameters}
    if isinstance(optimizer, (str, os.PathLike, AdamState)):
        return ShardedOptimizer(optimizer, names)
    if isinstance(optimizer, (list, tuple, OptimizerAtHand)):
        _refuse(
            "several optimizers" if not isinstance(optimizer, OptimizerAtHand) else "an optimizer that was read before"
        )
    inner = innermost(optimizer)
    if type(inner) not in _IN_CLOSED_FORM:
        _refuse(f"a {kind_name(inner)}, whose step would be found on copies of whole parameters")
    return ShardedOptimizer(inner, names)


def left_out(optimizer: torch.optim.Optimizer, *, momentum: bool) -> tuple[str, ...]:
    """What of a state is not needed."""
    return () if momentum or isinstance(optimizer, torch.optim.SGD) else _FIRST_MOMENTS


def exchanged(
    optimizer: torch.optim.Optimizer, parameters: Mapping[int, nn.Parameter], states: Mapping[int, dict[str, Any]]
) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings over other parameters, with their states."""
    found = bare_copy(optimizer)
    state: collections.defaultdict[Tensor, Any] = collections.defaultdict(dict)
    groups = []
    for group in optimizer.param_groups:
        own = [parameters.get(id(p), p) for p in group["params"]]
        groups.append({**group, "params": own})
        state.update({new: states[id(p)] for p, new in zip(group["params"], own, strict=True) if id(p) in states})
    found.param_groups, found.state = groups, state
    return found


def _of_file(given: str | os.PathLike[str] | AdamState, stand_ins: StandIns, model: nn.Module) -> OptimizerAtHand:
    found = read_optimizer(given, model, any_kind=True)
    if not stand_ins.cast:
        return found
    if found.live is not None:
        _refuse(f"a file of a {kind_name(found.live)}, whose step would be found on copies of parameters that are cast")
    return dataclasses.replace(found, values=stand_ins.by_name(model))


def _refuse(found: str) -> NoReturn:
    """Raise: an optimizer that is not read under sharding."""
    raise OptimizerStateError(
        f"the model is sharded by FSDP2, and the optimizer is {found}; torch.optim.Adam, AdamW and SGD are read.",
        fix="pass one of these, or the path of an Adam's file; or probe an unwrapped model with a whole state's file.",
    )
