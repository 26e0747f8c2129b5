"""Adam state from an ``optimizer.pt`` as transformers' Trainer and ``optimizer.state_dict()`` write it.

Such a file knows parameters by number only. They are matched by order, and every shape is checked; nothing in the file
is executed (``weights_only=True``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.adam_state import AdamState, ParameterMoments, read_groups, read_moments

__all__ = ["adam_state_from_file"]


def adam_state_from_file(path: str | os.PathLike[str], model: nn.Module) -> AdamState:
    """Read an optimizer file and match it to the model's trainable parameters.

    Args:
        path: the file; loaded on the CPU.
        model: the model it belongs to, possibly wrapped.

    Raises:
        OptimizerStateError: the file is missing, holds anything but tensors and plain containers, is not Adam's, or does
            not fit the model in count or shape.
    """
    saved = _load(path)
    named = [(name, p) for name, p in unwrap_model(model).named_parameters() if p.requires_grad]
    groups = saved["param_groups"]
    numbers = [list(group["params"]) for group in groups]
    names = _match(path, unwrap_model(model), named, groups, numbers, saved["state"])
    shape_of = {name: tuple(p.shape) for name, p in named}
    group_of: dict[str, int] = {}
    moments: dict[str, ParameterMoments] = {}
    for index, (group_numbers, group_names) in enumerate(zip(numbers, names, strict=True)):
        for number, name in zip(group_numbers, group_names, strict=True):
            group_of[name] = index
            amsgrad = bool(groups[index].get("amsgrad", False))
            found = read_moments(name, shape_of[name], saved["state"].get(number, {}), amsgrad)
            if found is not None:
                moments[name] = found
    return AdamState(read_groups(groups), group_of, moments)


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise OptimizerStateError(f"optimizer file {path} does not exist.", fix="check the path.") from error
    except Exception as error:  # a damaged file can fail anywhere in the unpickler (IndexError, AssertionError, ...)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OptimizerStateError(
            f"optimizer file {path} cannot be read as plain tensors: {reason}",
            fix="save it with torch.save(optimizer.state_dict(), path); files that need to run code are refused.",
        ) from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        found = f"keys {sorted(map(str, saved))[:6]}" if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise OptimizerStateError(
            f"optimizer file {path} holds {found}; expected 'state' and 'param_groups'.",
            fix="pass the file written by optimizer.state_dict() (Trainer's optimizer.pt).",
        )
    groups, state = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise OptimizerStateError(f"optimizer file {path}: a parameter group lists no 'params'.", fix="save it again.")
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise OptimizerStateError(f"optimizer file {path}: 'state' is not a table of entries.", fix="save it again.")
    return saved


def _match(
    path: str | os.PathLike[str],
    module: nn.Module,
    named: Sequence[tuple[str, Tensor]],
    groups: Sequence[Mapping[str, Any]],
    numbers: Sequence[Sequence[int]],
    state: Mapping[int, Mapping[str, Any]],
) -> list[list[str]]:
    """Names for the numbers of every group, from the first known order in which every count and shape fits."""
    count = sum(map(len, numbers))
    if count != len(named):
        raise OptimizerStateError(
            f"optimizer file {path} covers {count} parameters, the model has {len(named)} trainable ones.",
            fix="freeze and adapt the model exactly as it was in training (the same adapter, the same modules to save).",
        )
    problems = []
    for label, order in _orders(module, [name for name, _ in named], groups):
        if [len(part) for part in order] != [len(part) for part in numbers]:
            sizes = [len(part) for part in order]
            problems.append(f"{label}: group sizes would be {sizes}, the file has {[len(p) for p in numbers]}")
            continue
        mismatch = _first_mismatch(order, numbers, state, {name: tuple(p.shape) for name, p in named})
        if mismatch is None:
            return order
        problems.append(f"{label}: {mismatch}")
    raise OptimizerStateError(
        f"optimizer file {path} does not fit the model. Tried " + "; ".join(problems) + ".",
        fix="pass the live optimizer, or one group in named_parameters() order, or the groups of transformers' Trainer "
        "(with and without weight decay).",
    )


def _orders(
    module: nn.Module, names: Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[list[str]]]]:
    if all("param_names" in group for group in groups):
        return [("names in the file", [list(group["param_names"]) for group in groups])]
    orders = []
    if len(groups) > 1:
        orders.append(("Trainer's order", _trainer_order(module, names)))
    flat, rest = [], list(names)
    for group in groups:
        size = len(group["params"])
        flat.append(rest[:size])
        rest = rest[size:]
    # Consecutive slices are a guess when there is more than one group; shapes decide.
    orders.append(("named_parameters() order", flat))
    return orders


def _trainer_order(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Two groups: with weight decay, and without (biases and norms), each in named_parameters() order.

    The rule is Trainer.get_decay_parameter_names of transformers.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decay = set(get_parameter_names(module, [nn.LayerNorm], patterns))
    return [[n for n in names if n in decay], [n for n in names if n not in decay]]


def _first_mismatch(
    order: Sequence[Sequence[str]],
    numbers: Sequence[Sequence[int]],
    state: Mapping[int, Mapping[str, Any]],
    shape_of: Mapping[str, tuple[int, ...]],
) -> str | None:
    for group_names, group_numbers in zip(order, numbers, strict=True):
        for name, number in zip(group_names, group_numbers, strict=True):
            if name not in shape_of:
                return f"the model has no trainable parameter '{name}'"
            moment = state.get(number, {}).get("exp_avg_sq")
            if isinstance(moment, Tensor) and tuple(moment.shape) != shape_of[name]:
                return f"entry {number} has shape {list(moment.shape)} where '{name}' has {list(shape_of[name])}"
    return None
