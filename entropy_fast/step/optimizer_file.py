"""Optimizers from files and folders.

What transformers' Trainer, accelerate, ``torch.save(optimizer.state_dict(), path)`` and ``torch.distributed.checkpoint`` write.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.errors import EntropyFastError, OptimizerStateError
from entropy_fast.step.adam_state import AdamState
from entropy_fast.step.adam_values import (
    AdamGroup,
    ParameterMoments,
    check_moments,
    maximize_notes,
    read_groups,
    read_moments,
)
from entropy_fast.step.optimizer_archive import read_archive
from entropy_fast.step.optimizer_kinds import OptimizerKind, kinds_of, unknown_settings
from entropy_fast.step.parameter_matching import match_parameters, of_trained_parameter
from entropy_fast.step.quantized_moments import is_quantized
from entropy_fast.step.restored import restored_optimizer
from entropy_fast.step.saved_optimizer import SavedOptimizer, plain_entry, saved_optimizer
from entropy_fast.step.scalars import shown

__all__ = ["RestoredOptimizer", "adam_state_from_file", "adam_state_of", "is_adams", "read_optimizer_file"]

METADATA = ".metadata"  # what makes a folder one of torch.distributed.checkpoint
WELL_KNOWN = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_0",
)  # where Trainer and accelerate put an optimizer in a folder

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class RestoredOptimizer:
    """An optimizer of another kind than Adam, made again from its file.

    Attributes:
        optimizer: on the model's parameters.
        notes: what a reader of the result has to know about how it was read, one sentence each.
    """

    optimizer: torch.optim.Optimizer
    notes: tuple[str, ...] = ()


def adam_state_from_file(path: str | os.PathLike[str], model: nn.Module) -> AdamState:
    """Read an optimizer file and match it to the model's trainable parameters.

    Names in the file win over any order. Entries of frozen parameters are left out.

    Args:
        path: the file, or a folder of ``torch.distributed.checkpoint``; loaded on the CPU.
        model: the model it belongs to, possibly wrapped.

    Returns:
        The state; `AdamState.notes` say where an order or a kind of optimizer was guessed.

    Raises:
        OptimizerStateError: the file is missing or damaged, holds anything but tensors and plain containers, is not Adam's, or
            does not fit the model in names, count or shape.
        LearningRateError: a group's learning rate is negative, not finite, or too small to be multiplied with.
    """
    return _understood(path, lambda: _Matched.of(path, model).adam_state())


def read_optimizer_file(
    path: str | os.PathLike[str], model: nn.Module, only: Collection[str] | None = None
) -> AdamState | RestoredOptimizer:
    """Likewise of any optimizer that can be read from a file.

    Args:
        path: the file, or a folder of ``torch.distributed.checkpoint``; loaded on the CPU.
        model: the model it belongs to, possibly wrapped.
        only: names of the parameters whose state is asked for, beside which a folder's is not read; None for all.

    Returns:
        The state where all groups are Adam's, and else the optimizer itself.

    Raises:
        OptimizerStateError, LearningRateError: see `adam_state_from_file`.
    """

    def read() -> AdamState | RestoredOptimizer:
        matched = _Matched.of(path, model, only)
        return matched.adam_state() if all(kind is None for kind in matched.kinds) else matched.restored()

    return _understood(path, read)


def is_adams(path: str | os.PathLike[str], model: nn.Module) -> bool:
    """Whether all groups of an optimizer's file are Adam's; of a folder the state of one parameter is read.

    Raises:
        OptimizerStateError, LearningRateError: see `adam_state_from_file`.
    """
    first = [name for name, p in unwrap_model(model).named_parameters() if p.requires_grad][:1]
    return _understood(path, lambda: all(kind is None for kind in _Matched.of(path, model, first).kinds))


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


def _understood(path: str | os.PathLike[str], read: Callable[[], Found]) -> Found:
    try:
        return read()
    except EntropyFastError:
        raise
    except Exception as error:  # whatever a file can hold that its checks do not know
        raise OptimizerStateError(
            f"optimizer file {os.fspath(path)} holds something that is not understood: {type(error).__name__}.",
            fix="save it again with torch.save(optimizer.state_dict(), path).",
        ) from error


@dataclasses.dataclass(frozen=True)
class _Matched:
    """A file's content, with the model's names for its parameters and the optimizer that each group is of."""

    saved: SavedOptimizer
    names: Sequence[Sequence[str]]
    kinds: Sequence[OptimizerKind | None]
    module: nn.Module
    notes: tuple[str, ...]

    @classmethod
    def of(cls, path: str | os.PathLike[str], model: nn.Module, only: Collection[str] | None = None) -> _Matched:
        module = unwrap_model(model)
        saved = _content(os.fspath(path), of_trained_parameter(module, only))
        kinds = kinds_of(saved)
        names, notes = match_parameters(saved, kinds, module)
        return cls(saved, names, kinds, module, (*saved.notes, *notes, *_strange_settings(saved, kinds)))

    def adam_state(self) -> AdamState:
        others = {kind.name: index for index, kind in reversed(list(enumerate(self.kinds))) if kind is not None}
        if others:
            told = ", ".join(f"parameter group {index} is that of {name}" for name, index in sorted(others.items()))
            raise OptimizerStateError(
                f"optimizer file {self.saved.path}: {told}, without betas and eps as Adam has them; the geometry "
                "'adam_static' is Adam's.",
                fix="take step='next' (--step next) with the engine one_pass, which is of any optimizer.",
            )
        groups = read_groups(self.saved.groups)
        group_of: dict[str, int] = {}
        moments: dict[str, ParameterMoments] = {}
        quantized: list[str] = []
        shape_of = {name: tuple(p.shape) for name, p in self.module.named_parameters() if p.requires_grad}
        for index, (keys, group_names) in enumerate(zip(self.saved.keys, self.names, strict=True)):
            for key, name in zip(keys, group_names, strict=True):
                if name not in shape_of:
                    continue
                group_of[name] = index
                entry = plain_entry(self.saved.state.get(key, {}))
                found = read_moments(name, shape_of[name], entry, groups[index].amsgrad)
                if found is not None:
                    moments[name] = found
                    quantized += [name] if is_quantized(entry) else []
        check_moments(moments)
        notes = (*self.notes, *maximize_notes(groups), *self._whose(groups), *_code_notes(moments, quantized))
        return AdamState(groups, group_of, moments, notes)

    def restored(self) -> RestoredOptimizer:
        adams = [index for index, kind in enumerate(self.kinds) if kind is None]
        groups = read_groups([self.saved.groups[index] for index in adams])
        optimizer = restored_optimizer(self.saved, self.names, self.kinds, self.module)
        return RestoredOptimizer(optimizer, (*self.notes, *self._whose(groups)))

    def _whose(self, groups: Sequence[AdamGroup]) -> tuple[str, ...]:
        """What the file leaves open about its Adam groups."""
        if any("state2" in plain_entry(entry) for entry in self.saved.state.values()):
            return (
                "the optimizer file is bitsandbytes', which does not say whether Adam, AdamW or LAMB wrote it: Adam or AdamW "
                "is taken, and LAMB's scale per layer is not applied.",
            )
        if any(group.decoupled is None and group.weight_decay for group in groups):
            return (
                "the optimizer file does not say whether its weight decay is AdamW's or added to the gradient, as Adam has it; "
                "along the whole next step AdamW's is taken.",
            )
        return ()


def _content(where: str, wanted: Callable[[str], bool]) -> SavedOptimizer:
    """What is in a file, or of a folder's content what belongs to the parameters that are wanted."""
    if not os.path.exists(where):
        raise OptimizerStateError(f"optimizer file {where} does not exist.", fix="check the path.")
    if os.path.isfile(where):
        return saved_optimizer(where, read_archive(where))
    if not os.path.isdir(where):
        raise OptimizerStateError(
            f"optimizer file {where} cannot be read: it is a pipe or a device.", fix="pass the path of a file."
        )
    if not os.path.isfile(os.path.join(where, METADATA)):
        there = [name for name in WELL_KNOWN if os.path.exists(os.path.join(where, name))]
        raise OptimizerStateError(
            f"optimizer file {where} cannot be read: it is a folder without the {METADATA} of torch.distributed.checkpoint"
            + (f", and has {' and '.join(there)}." if there else "."),
            fix=f"pass {os.path.join(where, there[0])}."
            if there
            else "pass the path of a file or of a checkpoint folder.",
        )
    # Imported where it is used: torch without torch.distributed has no such folders.
    from entropy_fast.step.checkpoint_folder import read_checkpoint_folder

    return saved_optimizer(where, read_checkpoint_folder(Path(where), wanted))


def _strange_settings(saved: SavedOptimizer, kinds: Sequence[OptimizerKind | None]) -> tuple[str, ...]:
    strange: dict[str, set[str]] = {}
    for group, kind in zip(saved.groups, kinds, strict=True):
        strange.setdefault("Adam" if kind is None else kind.name, set()).update(unknown_settings(kind, group))
    return tuple(
        f"groups of the optimizer file are read as those of {name}, and have settings that it does not know: "
        f"{', '.join(shown(setting) for setting in sorted(found)[:8])}. If they change the step, it is not the one described."
        for name, found in strange.items()
        if found
    )


def _code_notes(moments: dict[str, ParameterMoments], quantized: Sequence[str]) -> tuple[str, ...]:
    """What 8-bit codes cost."""
    if not quantized:
        return ()
    elements = sum(moments[name].second_moment.numel() for name in quantized)
    lost = sum(int((moments[name].second_moment == 0).sum()) for name in quantized)
    return (
        f"second moments of {len(quantized)} parameters are bitsandbytes' codes of 8 bits, which its optimizer steps by: "
        f"{lost / elements:.2%} of their {elements} elements are at code 0, since they are 0 or far below the largest of their "
        "block, and count as elements without a second moment.",
    )
