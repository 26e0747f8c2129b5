"""What the probe needs of an Adam or AdamW optimizer, read from a live one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.errors import OptimizerStateError

__all__ = ["AdamGroup", "AdamState", "ParameterMoments"]


@dataclasses.dataclass(frozen=True)
class AdamGroup:
    """Hyperparameters of one parameter group: learning rate, β2 and ε."""

    learning_rate: float
    beta2: float
    eps: float
    amsgrad: bool


@dataclasses.dataclass(frozen=True)
class ParameterMoments:
    """Second moment of one parameter.

    Attributes:
        second_moment: v, in the parameter's shape, not bias-corrected; AMSGrad's running maximum where it is used.
        step: number of optimizer steps taken.
    """

    second_moment: Tensor
    step: float


@dataclasses.dataclass(frozen=True)
class AdamState:
    """Groups, and for every named parameter its group and (once it has been stepped) its moments."""

    groups: tuple[AdamGroup, ...]
    group_of: Mapping[str, int]
    moments: Mapping[str, ParameterMoments]

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
        """Read a live optimizer. Nothing is copied but references, and nothing is changed.

        Args:
            optimizer: ``torch.optim.Adam`` or ``AdamW`` (also wrapped by accelerate).
            model: the model it steps, possibly wrapped; parameters are matched by identity.

        Raises:
            OptimizerStateError: another optimizer, or state of the wrong shape.
        """
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            optimizer = inner
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptimizerStateError(
                f"the optimizer is a {type(optimizer).__name__}, expected torch.optim.Adam or AdamW.",
                fix="check the order of the arguments (model, optimizer, rollouts); a state_dict has to be saved with "
                "torch.save and passed as a path, since it is matched to the model by order and shape.",
            )
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise OptimizerStateError(
                f"the optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}; the geometry is Adam's.",
                fix="pass torch.optim.Adam or AdamW, or the path of an optimizer.pt written by one of them.",
            )
        name_of = {id(p): name for name, p in unwrap_model(model).named_parameters()}
        group_of: dict[str, int] = {}
        moments: dict[str, ParameterMoments] = {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = name_of.get(id(parameter))
                if name is None:
                    continue
                group_of[name] = index
                found = read_moments(name, tuple(parameter.shape), optimizer.state.get(parameter, {}), group["amsgrad"])
                if found is not None:
                    moments[name] = found
        if not group_of:
            raise OptimizerStateError(
                "the optimizer holds none of the model's parameters (they are matched by identity).",
                fix="build the optimizer from this model's parameters, after adapters were added and wrappers applied. "
                "Sharded or flattened parameters (FSDP, DeepSpeed) cannot be matched.",
            )
        return cls(read_groups(optimizer.param_groups), group_of, moments)


def read_groups(param_groups: Sequence[Mapping[str, Any]]) -> tuple[AdamGroup, ...]:
    """Hyperparameters of every group.

    Raises:
        OptimizerStateError: a group is not Adam's.
    """
    groups = []
    for index, group in enumerate(param_groups):
        try:
            groups.append(
                AdamGroup(
                    float(group["lr"]), float(group["betas"][1]), float(group["eps"]), bool(group.get("amsgrad", False))
                )
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise OptimizerStateError(
                f"parameter group {index} has keys {sorted(map(str, group))}; Adam's lr, betas and eps are expected.",
                fix="pass an Adam or AdamW optimizer.",
            ) from error
    return tuple(groups)


def read_moments(name: str, shape: tuple[int, ...], state: Mapping[str, Any], amsgrad: bool) -> ParameterMoments | None:
    """Moments of one parameter, None when it was never stepped.

    Raises:
        OptimizerStateError: state without a second moment or step, of another shape, or not finite.
    """
    if not state:
        return None
    key = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
    moment, step = state.get(key), state.get("step")
    if isinstance(step, Tensor) and step.numel() == 1:
        step = float(step)
    if not isinstance(moment, Tensor) or not isinstance(step, (int, float)):
        raise OptimizerStateError(
            f"optimizer state of '{name}' has keys {sorted(map(str, state))}; expected '{key}' and 'step'.",
            fix="use torch's Adam or AdamW (8-bit and factored optimizers do not keep an elementwise second moment).",
        )
    if tuple(moment.shape) != shape:
        raise OptimizerStateError(
            f"optimizer state of '{name}' has shape {list(moment.shape)}, the parameter {list(shape)}.",
            fix="use the optimizer state that was saved with this model and adapter.",
        )
    if not math.isfinite(float(step)) or float(step) < 1 or not bool(torch.isfinite(moment).all()):
        raise OptimizerStateError(
            f"optimizer state of '{name}' has step {float(step)} and "
            f"{int((~torch.isfinite(moment)).sum())} second moments that are not finite.",
            fix="use the state of a healthy checkpoint, after at least one step.",
        )
    return ParameterMoments(moment.detach(), float(step))
