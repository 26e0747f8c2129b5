"""Trainable parameters with a tangent, in their modules' places while a forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad

from entropy_fast.checks.model_state import checkpointed_modules

__all__ = ["parameters_with_tangents", "tangent_of", "without_checkpointing"]


def tangent_of(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor without its tangent, and the tangent, None where there is none."""
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal, tangent


@contextlib.contextmanager
def parameters_with_tangents(
    module: nn.Module, parameters: Sequence[Tensor], tangents: Sequence[Tensor], apart: Sequence[nn.Module]
) -> Iterator[None]:
    """Inside a ``dual_level``: every module that holds one of the parameters sees it with its tangent.

    A parameter that several modules hold has one tangent in all of them.

    Args:
        module: the model.
        parameters: the trainable ones.
        tangents: one a parameter, in its shape, dtype and device.
        apart: modules that keep their plain parameters.
    """
    duals: Mapping[int, Any] = {
        id(p): forward_ad.make_dual(p.detach(), t)  # type: ignore[no-untyped-call]
        for p, t in zip(parameters, tangents, strict=True)
    }
    exchanged: list[tuple[nn.Module, str, nn.Parameter]] = []
    left_alone = {id(m) for m in apart}
    try:
        for submodule in module.modules():
            for slot, parameter in submodule._parameters.items() if id(submodule) not in left_alone else ():
                if parameter is not None and id(parameter) in duals:
                    exchanged.append((submodule, slot, parameter))
        for submodule, slot, parameter in exchanged:
            submodule._parameters[slot] = duals[id(parameter)]
        yield
    finally:
        for submodule, slot, parameter in exchanged:
            submodule._parameters[slot] = parameter


@contextlib.contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Gradient checkpointing off: without a graph there is nothing to recompute, and its function has no forward derivative."""
    switched = [m for _, m in checkpointed_modules(module)]
    own = [m for m in switched if "gradient_checkpointing" in vars(m)]
    try:
        for submodule in switched:
            submodule.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for submodule in switched:
            if submodule in own:
                submodule.gradient_checkpointing = True  # type: ignore[assignment]
            else:
                del submodule.gradient_checkpointing
