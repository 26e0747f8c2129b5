"""What the probe needs of an Adam or AdamW optimizer, read from a live one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.checks.sharding import refuse_sharded
from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.adam_values import (
    AdamGroup,
    ParameterMoments,
    check_moments,
    maximize_notes,
    read_groups,
    read_moments,
)
from entropy_fast.step.joined import kind_name

__all__ = ["AdamGroup", "AdamState", "ParameterMoments", "innermost", "is_adam"]


@dataclasses.dataclass(frozen=True)
class AdamState:
    """Groups, and for every named parameter its group and (once it has been stepped) its moments.

    Attributes:
        groups: hyperparameters by group.
        group_of: parameter name -> index of its group.
        moments: parameter name -> second moment and step count.
        notes: what a reader of the result has to know about how this was read, one sentence each.
    """

    groups: tuple[AdamGroup, ...]
    group_of: Mapping[str, int]
    moments: Mapping[str, ParameterMoments]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
        """Read a live optimizer. Nothing is copied but references, and nothing is changed.

        Args:
            optimizer: ``torch.optim.Adam`` or ``AdamW`` (also wrapped by accelerate).
            model: the model it steps, possibly wrapped; parameters are matched by identity.

        Raises:
            ModelStateError: parameters are flattened or sharded.
            OptimizerStateError: another optimizer, or state of the wrong shape or with impossible values.
            LearningRateError: a group's learning rate is negative, not finite, or too small to be multiplied with.
        """
        optimizer = innermost(optimizer)
        _refuse_other_kinds(optimizer)
        refuse_sharded(model)
        module = unwrap_model(model)
        groups = read_groups(optimizer.param_groups)
        if isinstance(optimizer, torch.optim.AdamW) or type(optimizer) is torch.optim.Adam:
            # Older versions of torch do not say so in the group.
            decoupled = isinstance(optimizer, torch.optim.AdamW)
            groups = tuple(dataclasses.replace(g, decoupled=decoupled) if g.decoupled is None else g for g in groups)
        name_of = {id(p): name for name, p in module.named_parameters()}
        group_of: dict[str, int] = {}
        moments: dict[str, ParameterMoments] = {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = name_of.get(id(parameter))
                if name is None:
                    continue
                group_of[name] = index
                entry = optimizer.state.get(parameter, {})
                found = read_moments(name, tuple(parameter.shape), entry, groups[index].amsgrad)
                if found is not None:
                    moments[name] = found
        if not group_of:
            raise OptimizerStateError(
                "the optimizer holds none of the model's parameters (they are matched by identity).",
                fix="build the optimizer from this model's parameters, after adapters were added and wrappers applied. "
                "Sharded or flattened parameters (FSDP, DeepSpeed) cannot be matched.",
            )
        check_moments(moments)
        return cls(groups, group_of, moments, maximize_notes(groups))

    @classmethod
    def identity(cls, model: nn.Module) -> AdamState:
        """A state with P = 1 and learning rate 1 for every trainable parameter, where there is no optimizer to ask.

        Args:
            model: the model, possibly wrapped.
        """
        named = {name: p for name, p in unwrap_model(model).named_parameters() if p.requires_grad}
        moments = {
            name: ParameterMoments(torch.ones_like(p, dtype=torch.promote_types(p.dtype, torch.float32)).detach(), 1.0)
            for name, p in named.items()
        }
        return cls((AdamGroup(1.0, 0.0, 0.0, amsgrad=False),), dict.fromkeys(named, 0), moments)


def innermost(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer under accelerate's wrapper.

    Raises:
        OptimizerStateError: it is DeepSpeed's, or no optimizer.
    """
    while True:
        kind = type(optimizer)
        called = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__.split(".")[0] == "deepspeed" or kind.__name__.startswith("DeepSpeed"):
            raise OptimizerStateError(
                f"the optimizer is a {called}: DeepSpeed keeps second moments of flattened, partitioned fp32 copies, which "
                "cannot be matched to the model's parameters.",
                fix="consolidate the checkpoint and train or restore with torch.optim.AdamW on whole parameters to probe.",
            )
        if isinstance(optimizer, LRScheduler):
            raise OptimizerStateError(
                f"the optimizer is a {called}, which is a learning-rate scheduler.",
                fix="pass the optimizer itself (scheduler.optimizer).",
            )
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
            break
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerStateError(
            f"the optimizer is a {kind.__name__}, expected an optimizer such as torch.optim.AdamW.",
            fix="check the order of the arguments (model, optimizer, rollouts); a state_dict has to be saved with "
            "torch.save and passed as a path, since it is matched to the model by order and shape.",
        )
    return optimizer


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's Adam or AdamW, or a kind of it."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _refuse_other_kinds(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless it has Adam's second moments."""
    called = kind_name(optimizer)
    if type(optimizer).__module__.split(".")[0] == "bitsandbytes":
        raise OptimizerStateError(
            f"the optimizer is a {called}: for 'adam_static' bitsandbytes' optimizers are not read live. Adam and AdamW with "
            "32-bit or 8-bit states (paged or not) are, from a file; LAMB, LARS, Lion, Adagrad, RMSprop, SGD and AdEMAMix have "
            "another geometry.",
            fix="take step='next', which is of any optimizer; or, for Adam and AdamW, "
            "torch.save(optimizer.state_dict(), path), and pass the path.",
        )
    if not is_adam(optimizer):
        raise OptimizerStateError(
            f"the optimizer is a {called}; the geometry 'adam_static' is Adam's.",
            fix="take step='next', which is of any optimizer; or pass torch.optim.Adam or AdamW, or the path of a file "
            "that one of them wrote.",
        )
