"""An optimizer made again from its file: the class that wrote it, on the model's parameters, with the state that was saved.

Where there is no geometry of Adam's, the next step is found by the optimizer's own code on copies, as with a live one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.adam_values import read_groups, read_moments
from entropy_fast.step.joined import JoinedOptimizer
from entropy_fast.step.optimizer_kinds import OptimizerKind, checked_entry
from entropy_fast.step.saved_optimizer import SavedOptimizer, plain_entry
from entropy_fast.step.scalars import real_number, shown

__all__ = ["restored_optimizer"]

NO_SETTINGS = ("params", "param_names")
HOW = ("capturable", "fused")  # how a step is computed, on the device where it was trained


def restored_optimizer(
    saved: SavedOptimizer,
    names: Sequence[Sequence[str]],
    kinds: Sequence[OptimizerKind | None],
    module: nn.Module,
) -> torch.optim.Optimizer:
    """The optimizer of a file, as it was when it was saved. Nothing of the model changes.

    Args:
        saved: the file's content.
        names: for every group, the model's names of its parameters. Frozen ones are left out.
        kinds: of every group; None for Adam's.
        module: the unwrapped model.

    Returns:
        One of the class that wrote the file; several classes are joined.

    Raises:
        OptimizerStateError: settings or state are none that the class takes, or the class is not installed.
        LearningRateError: a group's learning rate is negative, not finite, or too small to be multiplied with.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parts = []
    for index, (group, kind) in enumerate(zip(saved.groups, kinds, strict=True)):
        own = [(name, key) for name, key in zip(names[index], saved.keys[index], strict=True) if name in named]
        if not own:
            continue
        entries = {name: plain_entry(saved.state.get(key, {})) for name, key in own}
        if kind is None:
            parts.append(_adam(index, group, entries, named))
        else:
            parts.append(_other(saved.path, index, kind, group, entries, named))
    if not parts:
        raise OptimizerStateError(
            f"optimizer file {saved.path} has no trainable parameter of the model.",
            fix="freeze and adapt the model exactly as it was in training.",
        )
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        return JoinedOptimizer(parts)
    for part in parts[1:]:
        first.add_param_group(part.param_groups[0])
        first.state.update(part.state)
    return first


def _adam(
    index: int, group: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], named: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Adam of torch, or AdamW where nothing says whose decay it is."""
    (settings,) = read_groups([group])
    if settings.beta1 is None or settings.weight_decay is None:
        raise OptimizerStateError(
            f"parameter group {index} of Adam's has no usable betas and weight_decay, which the next step depends on.",
            fix="use the state of a healthy checkpoint.",
        )
    kind = torch.optim.Adam if settings.decoupled is False else torch.optim.AdamW
    optimizer = kind(
        [named[name] for name in entries],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        amsgrad=settings.amsgrad,
        maximize=settings.maximize,
    )
    for name, entry in entries.items():
        parameter = named[name]
        moments = read_moments(name, tuple(parameter.shape), entry, settings.amsgrad)
        if moments is None:
            continue
        running = moments.running_second_moment if settings.amsgrad else moments.second_moment
        if moments.first_moment is None or running is None:
            raise OptimizerStateError(
                f"optimizer state of {name!r} has second moments and no usable first ones, which the next step is made of.",
                fix="use the state of a healthy checkpoint.",
            )
        state: dict[str, Any] = {"exp_avg": moments.first_moment, "exp_avg_sq": running}
        if settings.amsgrad:
            state["max_exp_avg_sq"] = moments.second_moment
        state = {key: value.to(parameter) for key, value in state.items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(moments.step)), **state}
    return optimizer


def _other(
    path: str,
    index: int,
    kind: OptimizerKind,
    group: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
    named: Mapping[str, nn.Parameter],
) -> torch.optim.Optimizer:
    strange = next((key for key, value in group.items() if key not in NO_SETTINGS and not _is_setting(value)), None)
    if strange is not None:
        raise OptimizerStateError(
            f"optimizer file {path}: parameter group {index}, of {kind.name}, has as {shown(strange)} {shown(group[strange])}; "
            "settings are finite numbers, texts or nothing.",
            fix="use the state of a healthy checkpoint.",
        )
    try:
        taken = kind.takes() - set(HOW)
        optimizer = kind.load()(
            [named[name] for name in entries], **{key: value for key, value in group.items() if key in taken}
        )
    except Exception as error:  # the class's own checks of its settings, or no such class
        reason = str(error).splitlines()[0] if str(error) else ""
        raise OptimizerStateError(
            f"optimizer file {path}: parameter group {index} is that of {kind.name}, which cannot be made of it: "
            f"{type(error).__name__}: {reason}",
            fix="use the state of a healthy checkpoint, with the versions of torch and transformers that wrote it.",
        ) from error
    for name, entry in entries.items():
        parameter = named[name]
        checked = checked_entry(kind, group, name, tuple(parameter.shape), entry)
        if checked:
            optimizer.state[parameter] = {key: _kept(value, kind, parameter) for key, value in checked.items()}
    return optimizer


def _is_setting(value: object) -> bool:
    """Whether a group can have it: a finite number (a tensor of one, too), a text, None, or a few of these."""
    if isinstance(value, (tuple, list)):
        return all(not isinstance(item, (tuple, list)) and _is_setting(item) for item in value)
    if value is None or isinstance(value, (bool, str)):
        return True
    number = real_number(value)
    return number is not None and math.isfinite(number)


def _kept(value: Any, kind: OptimizerKind, parameter: Tensor) -> Any:
    """As torch's ``load_state_dict`` keeps a value: tensors on the parameter's device and in its type."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    return value.to(parameter.device) if kind.in_fp32 else value.to(parameter)
