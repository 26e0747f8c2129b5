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
from entropy_fast.step import AdamState, GivenOptimizer, OptimizerAtHand, optimizer_from_file, read_optimizer
from entropy_fast.step.adam_state import innermost
from entropy_fast.step.joined import bare_copy, kind_name

__all__ = ["ShardedOptimizer", "StandIns", "sharded_optimizer"]

_IN_CLOSED_FORM = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_FIRST_MOMENTS = ("exp_avg",)  # of Adam, which its static geometry does without


@dataclasses.dataclass(frozen=True)
class StandIns:
    """Whole parameters, by the identity of the sharded ones.

    Attributes:
        stepped: as the optimizer knows those that are trained, and that this rank keeps.
        computed: as forwards see them; the same objects where nothing is cast, nor comes and goes.
    """

    stepped: Mapping[int, nn.Parameter]
    computed: Mapping[int, nn.Parameter]

    def by_name(self, model: nn.Module) -> dict[str, Tensor]:
        """As the optimizer knows them, once forwards see them in this model."""
        places = {id(own): key for key, own in self.computed.items()}
        named = ((name, places.get(id(p))) for name, p in model.named_parameters())
        return {name: self.stepped[key] for name, key in named if key is not None and key in self.stepped}

    @property
    def apart(self) -> bool:
        """Whether some that are stepped are not those that forwards see."""
        return any(own is not self.computed[key] for key, own in self.stepped.items())

    @property
    def cast(self) -> bool:
        """Whether some are stepped in another dtype than they are computed in."""
        return any(own.dtype != self.computed[key].dtype for key, own in self.stepped.items())


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

    def of_stand_ins(
        self, stand_ins: StandIns, team: Team, kept: Mapping[int, str] | None, *, momentum: bool
    ) -> Callable[[nn.Module], OptimizerAtHand]:
        """Gather its state, a tensor at a time.

        Args:
            stand_ins: whole parameters.
            team: the ranks, all of which have to come here.
            kept: names of the parameters whose state this rank keeps, by their identity; None for all.
            momentum: whether Adam's first moments are wanted.

        Returns:
            From the model, whose parameters the stand-ins are by then, the optimizer as a probe takes it.
        """
        if not isinstance(self.given, torch.optim.Optimizer):
            return functools.partial(_of_file, self.given, stand_ins, kept)
        optimizer = self.given
        left_out = () if momentum or isinstance(optimizer, torch.optim.SGD) else _FIRST_MOMENTS
        states = {}
        for p in (p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)):
            whole_state = {
                key: gathered(team, value) for key, value in optimizer.state[p].items() if key not in left_out
            }
            if kept is None or id(p) in kept or id(p) not in self.names:
                states[id(p)] = whole_state

        def whole(model: nn.Module) -> OptimizerAtHand:
            found = read_optimizer(_exchanged(optimizer, stand_ins.computed, states), model, any_kind=True)
            if not stand_ins.apart:
                return found
            live = _exchanged(optimizer, {**stand_ins.computed, **stand_ins.stepped}, states)
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


def _exchanged(
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


def _of_file(
    given: str | os.PathLike[str] | AdamState, stand_ins: StandIns, kept: Mapping[int, str] | None, model: nn.Module
) -> OptimizerAtHand:
    only = None if kept is None else set(kept.values())
    known = given if isinstance(given, AdamState) else optimizer_from_file(given, model, only)
    found = read_optimizer(known, model, any_kind=True)
    if only is not None:
        # A single file is read whole.
        moments = {name: own for name, own in found.state.moments.items() if name in only}
        found = dataclasses.replace(found, state=dataclasses.replace(found.state, moments=moments))
    if not stand_ins.apart:
        return found
    live = found.live
    if live is not None:
        if stand_ins.cast:
            _refuse(f"a file of a {kind_name(live)}, whose step would be found on copies of parameters that are cast")
        stepped = {id(stand_ins.computed[key]): own for key, own in stand_ins.stepped.items()}
        live = _exchanged(live, stepped, {id(p): dict(own) for p, own in live.state.items()})
    return dataclasses.replace(found, live=live, values=stand_ins.by_name(model))


def _refuse(found: str) -> NoReturn:
    """Raise: an optimizer that is not read under sharding."""
    raise OptimizerStateError(
        f"the model is sharded by FSDP2, and the optimizer is {found}; torch.optim.Adam, AdamW and SGD are read.",
        fix="pass one of these, or the path of an Adam's file; or probe an unwrapped model with a whole state's file.",
    )
