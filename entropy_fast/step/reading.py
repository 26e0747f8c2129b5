"""What is known of an optimizer in whatever form it is given, and the step that it will take next."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from entropy_fast.checks.parameter_registry import ParameterRegistry, unwrap_model
from entropy_fast.checks.sharding import refuse_sharded
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import LearningRateError, OptimizerStateError
from entropy_fast.step.adam_state import AdamState, innermost, is_adam
from entropy_fast.step.adam_values import AdamGroup, ParameterMoments, check_learning_rate, maximize_notes
from entropy_fast.step.dry_run import DryRun
from entropy_fast.step.joined import JoinedOptimizer, kind_name
from entropy_fast.step.next_step import DryRunRule, NextStep, live_gradients
from entropy_fast.step.optimizer_file import RestoredOptimizer, read_optimizer_file
from entropy_fast.step.preconditioner import AdamPreconditioner
from entropy_fast.step.rules import AdamRule, SgdGroup, SgdRule, StepRule
from entropy_fast.step.scalars import real_number, shown

__all__ = [
    "GivenOptimizer",
    "OptimizerAtHand",
    "next_step_of",
    "optimizer_from_file",
    "preconditioner_of",
    "read_optimizer",
]


@dataclasses.dataclass(frozen=True)
class OptimizerAtHand:
    """An optimizer that was read.

    Attributes:
        state: groups and, of an Adam, its moments; of another kind every element has the same weight.
        live: the optimizer itself, without wrappers, or another kind than Adam made again from its file; None where an Adam's
            file or state was given.
        values: parameters as the optimizer steps them, by name, where the model computes with casts of them; None elsewhere.
    """

    state: AdamState
    live: torch.optim.Optimizer | None = None
    values: Mapping[str, Tensor] | None = None

    @property
    def is_adam(self) -> bool:
        """Whether ``state`` has Adam's second moments."""
        return self.live is None or is_adam(self.live)

    def stepped(self, registry: ParameterRegistry) -> list[Tensor]:
        """The parameters as the optimizer steps them, in registry order."""
        values = self.values or {}
        return [values.get(p.name, p.tensor) for p in registry.parameters]


GivenOptimizer: TypeAlias = (
    "torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | AdamState | OptimizerAtHand | str | os.PathLike[str]"
)


def read_optimizer(optimizer: GivenOptimizer, model: nn.Module, *, any_kind: bool) -> OptimizerAtHand:
    """Read an optimizer.

    Args:
        optimizer: live (also wrapped by accelerate), several live ones that train the model together, the path of a file or
            checkpoint folder, an `AdamState`, or what was read before.
        model: the model it belongs to, possibly wrapped.
        any_kind: whether it may be of another kind than Adam.

    Raises:
        ModelStateError: the model's parameters are flattened or sharded.
        OptimizerStateError: it is none of these, of another kind, or not this model's.
        LearningRateError: a learning rate that no step can be taken with.
    """
    refuse_sharded(model)
    if isinstance(optimizer, AdamState):
        return OptimizerAtHand(optimizer)
    if isinstance(optimizer, (str, os.PathLike)):
        optimizer = optimizer_from_file(optimizer, model)
    if isinstance(optimizer, OptimizerAtHand):
        if not optimizer.is_adam and not any_kind:
            assert optimizer.live is not None
            AdamState.from_optimizer(optimizer.live, model)  # says that it is of another kind
        return optimizer
    if isinstance(optimizer, (list, tuple)):
        optimizer = JoinedOptimizer([innermost(one) for one in optimizer])
    inner = innermost(optimizer)
    if is_adam(inner) or not any_kind:
        return OptimizerAtHand(AdamState.from_optimizer(inner, model), inner)
    return OptimizerAtHand(_without_geometry(inner, model), inner)


def optimizer_from_file(
    path: str | os.PathLike[str], model: nn.Module, only: Collection[str] | None = None
) -> OptimizerAtHand:
    """Read an optimizer from a file or a checkpoint folder.

    Args:
        path: of ``optimizer.pt``, ``optimizer.bin`` or a folder of ``torch.distributed.checkpoint``.
        model: the model it belongs to, possibly wrapped.
        only: names of the parameters whose state is asked for, beside which a folder's is not read; None for all.

    Returns:
        Of Adam its state. Another optimizer is made again on the model's parameters, and its next step found as a live one's.

    Raises:
        OptimizerStateError: it is missing, damaged, of an optimizer that is not read, or not this model's.
        LearningRateError: a learning rate that no step can be taken with.
    """
    found = read_optimizer_file(path, model, only)
    if not isinstance(found, RestoredOptimizer):
        return OptimizerAtHand(found)
    state = _without_geometry(found.optimizer, model)
    return OptimizerAtHand(dataclasses.replace(state, notes=(*found.notes, *state.notes)), found.optimizer)


def preconditioner_of(
    at_hand: OptimizerAtHand, registry: ParameterRegistry, estimate: EstimateOptions, *, next_step: bool
) -> AdamPreconditioner:
    """P of what is linear in the gradient: of Adam's static step, or of its share in the next one."""
    if not next_step:
        return AdamPreconditioner(at_hand.state, registry, estimate.learning_rate)
    plain = AdamPreconditioner(at_hand.state, registry, estimate.learning_rate)
    rule = _rule(at_hand, registry, plain)
    factors = [
        rule.factor(place) if isinstance(rule, (AdamRule, SgdRule)) else 0.0 for place in range(len(plain.rates))
    ]
    return AdamPreconditioner(at_hand.state, registry, estimate.learning_rate, factors)


def next_step_of(
    at_hand: OptimizerAtHand, registry: ParameterRegistry, step: AdamPreconditioner, estimate: EstimateOptions
) -> NextStep:
    """The step that the optimizer will take.

    Raises:
        OptimizerStateError: its state has no first moments.
        ConfigError: ``gradient="live"``, and there is no gradient.
    """
    groups = at_hand.state.groups
    return NextStep(
        _rule(at_hand, registry, step),
        tuple(p.group is not None for p in registry.parameters),
        step.learning_rate,
        all(group.maximize for group in groups),
        estimate.max_grad_norm,
        live_gradients(at_hand.stepped(registry)) if estimate.gradient == "live" else None,
        _dry(at_hand, registry, step),
    )


def _dry(at_hand: OptimizerAtHand, registry: ParameterRegistry, step: AdamPreconditioner) -> DryRun | None:
    """Steps on copies, where they are those of the learning rate that is asked for."""
    if at_hand.live is None or step.learning_rate != at_hand.state.groups[0].learning_rate:
        return None
    return DryRun(at_hand.live, at_hand.stepped(registry))


def _rule(at_hand: OptimizerAtHand, registry: ParameterRegistry, step: AdamPreconditioner) -> StepRule:
    live, state, stepped = at_hand.live, at_hand.state, at_hand.stepped(registry)
    places = range(len(registry.parameters))
    if live is not None and type(live) is torch.optim.SGD:
        settings = [_sgd_group(group, index) for index, group in enumerate(live.param_groups)]
        buffers = [live.state.get(p, {}).get("momentum_buffer") for p in stepped]
        of_group = [None if p.group is None else settings[p.group] for p in registry.parameters]
        return SgdRule(stepped, buffers, of_group, [step.rates[place] for place in places])
    if live is not None and type(live) not in (torch.optim.Adam, torch.optim.AdamW):
        found = state.groups[0].learning_rate
        check_learning_rate(found, f"the {kind_name(live)}'s first group has")  # its steps are scaled from there
        return DryRunRule(DryRun(live, stepped), stepped, step.learning_rate / found)
    return AdamRule(
        stepped,
        [state.moments.get(p.name) for p in registry.parameters],
        [None if p.group is None else _decoupled(state.groups[p.group]) for p in registry.parameters],
        [step.rates[place] for place in places],
    )


def _decoupled(group: AdamGroup) -> AdamGroup:
    """With AdamW's decay where nothing says whose it is."""
    return dataclasses.replace(group, decoupled=True) if group.decoupled is None else group


def _sgd_group(group: dict[str, object], index: int) -> SgdGroup:
    numbers = [real_number(group.get(name)) for name in ("lr", "momentum", "dampening", "weight_decay")]
    if any(number is None or not math.isfinite(number) for number in numbers):
        raise OptimizerStateError(
            f"parameter group {index} of the SGD has lr, momentum, dampening and weight_decay "
            f"{', '.join(shown(group.get(name)) for name in ('lr', 'momentum', 'dampening', 'weight_decay'))}.",
            fix="use finite numbers.",
        )
    lr, momentum, dampening, decay = (float(number) for number in numbers if number is not None)
    return SgdGroup(lr, momentum, dampening, decay, bool(group.get("nesterov")), bool(group.get("maximize")))


def _without_geometry(optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
    """Groups and learning rates of an optimizer of any kind; second moments that weigh every element alike."""
    named = {id(p): (name, p) for name, p in unwrap_model(model).named_parameters()}
    groups: list[AdamGroup] = []
    group_of: dict[str, int] = {}
    moments: dict[str, ParameterMoments] = {}
    for index, group in enumerate(optimizer.param_groups):
        rate = real_number(group.get("lr"))
        if rate is None:
            raise LearningRateError(
                f"learning rate: group {index} of the {kind_name(optimizer)} has {shown(group.get('lr'))}.",
                fix="set one; an optimizer that finds its own cannot be forecast yet.",
            )
        check_learning_rate(rate, f"the optimizer's group {index} has", or_zero=True)
        groups.append(AdamGroup(rate, 0.0, 0.0, amsgrad=False, maximize=bool(group.get("maximize", False))))
        for parameter in group["params"]:
            found = named.get(id(parameter))
            if found is not None:
                group_of[found[0]] = index
                moments[found[0]] = _ones(found[1])
    if not group_of:
        raise OptimizerStateError(
            "the optimizer holds none of the model's parameters (they are matched by identity).",
            fix="build the optimizer from this model's parameters, after adapters were added and wrappers applied.",
        )
    return AdamState(tuple(groups), group_of, moments, maximize_notes(groups))


def _ones(parameter: Tensor) -> ParameterMoments:
    return ParameterMoments(
        torch.ones_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32)).detach(), 1.0
    )
