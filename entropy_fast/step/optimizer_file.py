"""Adam state from an ``optimizer.pt``.

It may come from transformers' Trainer, ``torch.save(optimizer.state_dict(), path)`` or `get_optimizer_state_dict` of
``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.errors import EntropyFastError, OptimizerStateError
from entropy_fast.step.adam_state import AdamState
from entropy_fast.step.adam_values import (
    ParameterMoments,
    check_moments,
    maximize_notes,
    plain_entry,
    read_groups,
    read_moments,
)
from entropy_fast.step.optimizer_archive import SavedOptimizer, load_optimizer_file
from entropy_fast.step.parameter_matching import match_parameters

__all__ = ["adam_state_from_file", "adam_state_of"]


def adam_state_from_file(path: str | os.PathLike[str], model: nn.Module) -> AdamState:
    """Read an optimizer file and match it to the model's trainable parameters.

    Names in the file win over any order. Entries of frozen parameters are left out.

    Args:
        path: the file; loaded on the CPU.
        model: the model it belongs to, possibly wrapped.

    Returns:
        The state; `AdamState.notes` say where an order or a kind of optimizer was guessed.

    Raises:
        OptimizerStateError: the file is missing or damaged, holds anything but tensors and plain containers, is not Adam's, or
            does not fit the model in names, count or shape.
        LearningRateError: a group's learning rate is negative, not finite, or too small to be multiplied with.
    """
    saved = load_optimizer_file(path)
    try:
        return _read(saved, unwrap_model(model))
    except EntropyFastError:
        raise
    except Exception as error:  # whatever a file can hold that its checks do not know
        raise OptimizerStateError(
            f"optimizer file {saved.path} holds something that is not understood: {type(error).__name__}.",
            fix="save it again with torch.save(optimizer.state_dict(), path).",
        ) from error


def _read(saved: SavedOptimizer, module: nn.Module) -> AdamState:
    names, notes = match_parameters(saved, module)
    groups = read_groups(saved.groups)
    shape_of = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    group_of: dict[str, int] = {}
    moments: dict[str, ParameterMoments] = {}
    for index, (keys, group_names) in enumerate(zip(saved.keys, names, strict=True)):
        for key, name in zip(keys, group_names, strict=True):
            if name not in shape_of:
                continue
            group_of[name] = index
            found = read_moments(name, shape_of[name], saved.state.get(key, {}), groups[index].amsgrad)
            if found is not None:
                moments[name] = found
    check_moments(moments)
    notes += maximize_notes(groups)
    bitsandbytes = any("state2" in plain_entry(entry) for entry in saved.state.values())
    if not bitsandbytes and any(group.decoupled is None and group.weight_decay for group in groups):
        notes += (
            "the optimizer file does not say whether its weight decay is AdamW's or added to the gradient, as Adam has it; "
            "along the whole next step AdamW's is taken.",
        )
    if bitsandbytes:
        notes += (
            "the optimizer file is bitsandbytes', which does not say whether Adam, AdamW or LAMB wrote it: Adam or AdamW is "
            "taken, and LAMB's scale per layer is not applied.",
        )
    return AdamState(groups, group_of, moments, notes)


def adam_state_of(optimizer: torch.optim.Optimizer | AdamState | str | os.PathLike[str], model: nn.Module) -> AdamState:
    """The Adam state of a model in whatever form it is given.

    Args:
        optimizer: a live Adam or AdamW, the path of an ``optimizer.pt``, or the state itself.
        model: the model.

    Raises:
        OptimizerStateError: it is none of these, or not this model's.
    """
    if isinstance(optimizer, AdamState):
        return optimizer
    if isinstance(optimizer, (str, os.PathLike)):
        return adam_state_from_file(optimizer, model)
    return AdamState.from_optimizer(optimizer, model)
