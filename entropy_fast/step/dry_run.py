"""A step of the user's own optimizer on copies: what it would add to the parameters, whatever kind it is.

Parameters, their state and the groups' settings are copied, a few parameters at a time, into a second optimizer of the same
class; it steps, and the difference is Δθ. The optimizer itself, the parameters and the random state stay as they are.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.joined import bare_copy, kind_name

__all__ = ["DryRun"]

ELEMENTS_AT_ONCE = 1 << 24  # of parameters that are copied together


class DryRun:
    """Steps an optimizer on copies.

    Args:
        optimizer: any optimizer whose ``step()`` needs no closure.
        parameters: those whose steps are wanted; one it does not hold has none.

    Attributes:
        optimizer: the same.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self._parameters = list(parameters)
        self._group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}

    def holds(self, place: int) -> bool:
        """Whether the optimizer has the parameter."""
        return id(self._parameters[place]) in self._group_of

    def steps(
        self, gradients: Sequence[Tensor | None], *, decay: bool = True, wide: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Place and Δθ, in fp32 or wider, of every parameter that the optimizer holds and that has a gradient.

        Args:
            gradients: of the loss, one per parameter; None where none arrived, and then the optimizer passes it by.
            decay: False for a step without weight decay.
            wide: in float64, copies and their states, so that a difference of two such steps means something.

        Raises:
            OptimizerStateError: the optimizer cannot step on copies.
        """
        waiting: list[int] = []
        elements = 0
        for place, gradient in enumerate(gradients):
            if gradient is None or not self.holds(place):
                continue
            waiting.append(place)
            elements += self._parameters[place].numel()
            if elements >= ELEMENTS_AT_ONCE:
                yield from self._stepped(waiting, gradients, decay, wide)
                waiting, elements = [], 0
        if waiting:
            yield from self._stepped(waiting, gradients, decay, wide)

    def _stepped(
        self, places: list[int], gradients: Sequence[Tensor | None], decay: bool, wide: bool
    ) -> Iterator[tuple[int, Tensor]]:
        devices = {self._parameters[place].device for place in places if self._parameters[place].is_cuda}
        with torch.random.fork_rng(devices=sorted(device.index for device in devices)), torch.enable_grad():
            scratch, copies = self._scratch(places, decay, wide)
            for place, own in zip(places, copies, strict=True):
                gradient = gradients[place]
                assert gradient is not None
                own.grad = gradient.detach().to(device=own.device, dtype=own.dtype, copy=True)
            before = [own.detach().clone() for own in copies]
            try:
                type(scratch).step(scratch)
            except Exception as error:  # whatever another library's step may raise
                raise OptimizerStateError(
                    f"{kind_name(self.optimizer)} cannot step on copies of the parameters: "
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    fix="take step='adam_static' (--step adam_static) with an Adam, or an optimizer whose step() needs nothing "
                    "but gradients.",
                ) from error
        for place, own, kept in zip(places, copies, before, strict=True):
            width = torch.promote_types(own.dtype, torch.float32)
            yield place, own.detach().to(width) - kept.to(width)

    def _scratch(self, places: list[int], decay: bool, wide: bool) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """An optimizer of the same class and state over copies, and the copies."""
        optimizer = self.optimizer
        scratch = bare_copy(optimizer)
        copies: dict[int, Tensor] = {}
        state: collections.defaultdict[Tensor, Any] = collections.defaultdict(dict)
        for place in places:
            own = self._parameters[place].detach().clone(memory_format=torch.preserve_format)
            own = torch.nn.Parameter(own.double() if wide else own)
            copies[place] = own
            found = optimizer.state.get(self._parameters[place])
            if found:
                state[own] = {key: _copied(value, wide) for key, value in found.items()}
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            settings = {key: _copied(value, False) for key, value in group.items() if key != "params"}
            if not decay and "weight_decay" in settings:
                settings["weight_decay"] = type(settings["weight_decay"])(0)
            of_group = [copies[place] for place in places if self._group_of[id(self._parameters[place])] == index]
            if of_group:
                _keep_eps(settings, next(p.dtype for p in group["params"]))
                groups.append({"params": of_group, **settings})
        scratch.param_groups, scratch.state = groups, state
        return scratch, [copies[place] for place in places]


def _keep_eps(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """The ε₁ that torch.optim.Adafactor takes from its parameters' type, for copies in another type."""
    if "beta2_decay" in settings and settings["eps"][0] is None:
        settings["eps"] = (torch.finfo(dtype).eps, settings["eps"][1])


def _copied(value: Any, wide: bool) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.double() if wide and value.is_floating_point() and value.dim() else value
    return copy.deepcopy(value)
