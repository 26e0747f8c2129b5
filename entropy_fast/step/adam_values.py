"""The numbers of an Adam optimizer, checked where they are read: learning rates, β2, ε, step counts and second moments."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_fast.errors import LearningRateError, OptimizerStateError
from entropy_fast.step.quantized_moments import dequantized_entry, is_quantized
from entropy_fast.step.saved_optimizer import plain_entry
from entropy_fast.step.scalars import real_number, shown, shown_keys

__all__ = [
    "AdamGroup",
    "ParameterMoments",
    "check_learning_rate",
    "check_moments",
    "maximize_notes",
    "read_groups",
    "read_moments",
]

MOMENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class AdamGroup:
    """Hyperparameters of one parameter group.

    Attributes:
        learning_rate: lr.
        beta2: β2.
        eps: ε.
        amsgrad: whether it uses AMSGrad.
        maximize: whether it ascends.
        beta1: β1; None where it is not known.
        weight_decay: λ; None where it is not known.
        decoupled: whether decay shrinks the weights (AdamW) or is added to the gradient; None where that is not known.
    """

    learning_rate: float
    beta2: float
    eps: float
    amsgrad: bool
    maximize: bool = False
    beta1: float | None = None
    weight_decay: float | None = None
    decoupled: bool | None = None


@dataclasses.dataclass(frozen=True)
class ParameterMoments:
    """Moments of one parameter, in its shape, not bias-corrected.

    Attributes:
        second_moment: v; AMSGrad's running maximum where it is used.
        step: number of optimizer steps taken.
        first_moment: m; None where it was not found, or is v under another name.
        running_second_moment: v itself where ``second_moment`` is a maximum; None elsewhere.
    """

    second_moment: Tensor
    step: float
    first_moment: Tensor | None = None
    running_second_moment: Tensor | None = None


def read_groups(param_groups: Sequence[Mapping[str, Any]]) -> tuple[AdamGroup, ...]:
    """Hyperparameters of every group.

    Raises:
        OptimizerStateError: a group is not Adam's, its β2 is outside [0, 1), or its ε is negative or not finite.
        LearningRateError: a learning rate is negative, not finite, or too small to be multiplied with.
    """
    return tuple(_read_group(index, group) for index, group in enumerate(param_groups))


def _read_group(index: int, group: Mapping[str, Any]) -> AdamGroup:
    betas, amsgrad, maximize = group.get("betas"), group.get("amsgrad", False), group.get("maximize", False)
    rate, eps = real_number(group.get("lr")), real_number(group.get("eps"))
    two = isinstance(betas, (tuple, list)) and len(betas) == 2
    beta2 = real_number(betas[1]) if two else None  # type: ignore[index]
    flags = all(isinstance(flag, int) and flag in (0, 1) for flag in (amsgrad, maximize))
    if rate is None or eps is None or beta2 is None or not flags:
        if {"lr", "betas", "eps"} <= group.keys():
            used = {"amsgrad": False, "maximize": False, **group}
            found = ", ".join(f"{key} {shown(used[key])}" for key in ("lr", "betas", "eps", "amsgrad", "maximize"))
        else:
            found = f"keys {shown_keys(group)}"
        raise OptimizerStateError(
            f"parameter group {index} has {found}; Adam's lr, betas and eps are expected: numbers, and two of them for betas.",
            fix="pass an Adam or AdamW optimizer; one of another kind can be given live, for step='next'.",
        )
    check_learning_rate(rate, f"the optimizer's {'first group' if index == 0 else f'group {index}'} has", or_zero=True)
    if not 0 <= beta2 < 1:
        raise OptimizerStateError(
            f"parameter group {index} has β2 = {beta2}; it has to be in [0, 1), or second moments have no bias correction.",
            fix="use the state of a healthy checkpoint.",
        )
    if not (0 <= eps < math.inf):
        raise OptimizerStateError(
            f"parameter group {index} has ε = {eps}; it is added to a root and has to be finite and not negative.",
            fix="use the state of a healthy checkpoint.",
        )
    beta1, decay = real_number(betas[0]), real_number(group.get("weight_decay", 0.0))  # type: ignore[index]
    decoupled = group.get("decoupled_weight_decay")
    return AdamGroup(
        rate,
        beta2,
        eps,
        bool(amsgrad),
        bool(maximize),
        beta1 if beta1 is not None and 0 <= beta1 < 1 else None,
        decay if decay is not None and 0 <= decay < math.inf else None,
        decoupled if isinstance(decoupled, bool) else None,
    )


def check_learning_rate(rate: float, source: str, or_zero: bool = False) -> None:
    """Refuse a learning rate that no step can be taken with.

    Args:
        rate: the number.
        source: whose it is, as the beginning of a sentence that the number ends.
        or_zero: let 0 pass (a scheduler's first or last step, which another rate may overrule).

    Raises:
        LearningRateError: it is 0, negative, not finite, or below the smallest normal float64.
    """
    if (rate == 0 and or_zero) or sys.float_info.min <= rate < math.inf:
        return
    if rate == 0:
        consequence = "with it δH₁ = lr · U is 0 whatever the policy does"
    elif 0 < rate < sys.float_info.min:
        consequence = "it is so small that lr · U underflows, to a 0 that nobody measured"
    else:
        consequence = "with it δH₁ = lr · U is undefined"
    raise LearningRateError(
        f"learning rate: {source} {rate}; {consequence}.",
        fix="pass learning_rate=... (schedulers start, and end, at 0), or probe at a step with a rate above 0.",
    )


def maximize_notes(groups: Sequence[AdamGroup]) -> tuple[str, ...]:
    """What is to be known about the sign of the step.

    The update gradient is that of the objective Σ A S, and it is ascended. An optimizer with ``maximize=True`` ascends what
    was backpropagated: the same step where that is the objective, as ``maximize`` is meant, and the opposite one where it is
    a loss. Rollouts cannot tell which, so it is said.

    Raises:
        OptimizerStateError: some groups ascend and others descend.
    """
    ascending = [index for index, group in enumerate(groups) if group.maximize]
    if not ascending:
        return ()
    if len(ascending) < len(groups):
        raise OptimizerStateError(
            f"parameter groups {ascending} have maximize=True and the others do not: they step against one another on whatever "
            "is backpropagated, and the advantages do not say which of them follows the objective.",
            fix="use one setting of maximize for all groups.",
        )
    return (
        "the optimizer has maximize=True: the step is taken to ascend the objective Σ A S, as it does when the objective "
        "itself is backpropagated. If a loss is (its negative), the optimizer steps the other way and δH₁ has the other sign.",
    )


def read_moments(name: str, shape: tuple[int, ...], entry: Mapping[str, Any], amsgrad: bool) -> ParameterMoments | None:
    """Moments of one parameter, None when it was never stepped: no state, or step 0 and nothing in the moments.

    Args:
        name: the parameter's name.
        shape: its shape.
        entry: its state, from torch's Adam or one of bitsandbytes (which calls v ``state2``, and may keep it as 8-bit codes).
        amsgrad: take AMSGrad's running maximum.

    Raises:
        OptimizerStateError: state without a second moment or step, of another shape, negative or not finite.
    """
    entry = plain_entry(entry)
    if not entry:
        return None
    if is_quantized(entry):
        entry = dequantized_entry(name, entry)
    key = "max_exp_avg_sq" if amsgrad else "state2" if "state2" in entry else "exp_avg_sq"
    moment, step = entry.get(key), real_number(entry.get("step"))
    if not _is_dense(moment) or step is None:
        raise OptimizerStateError(
            f"optimizer state of {name!r} has keys {shown_keys(entry)}; expected '{key}' and 'step', a tensor of "
            "floating-point values and a number.",
            fix="use torch's Adam or AdamW (factored optimizers, and those with one state, keep no elementwise second moment); "
            "an optimizer of another kind can be given live, for step='next'.",
        )
    assert isinstance(moment, Tensor)
    if tuple(moment.shape) != shape:
        raise OptimizerStateError(
            f"optimizer state of {name!r} has shape {list(moment.shape)}, the parameter {list(shape)}.",
            fix="use the optimizer state that was saved with this model and adapter.",
        )
    if step == 0 and not any(bool(found.any()) for found in entry.values() if _is_dense(found)):
        return None  # a fused optimizer makes its state also at a step that an fp16 scaler has it skip
    if not (1 <= step < math.inf and step == math.floor(step)):
        raise OptimizerStateError(
            f"optimizer state of {name!r} has step {step}; a whole number of at least 1 is expected.",
            fix="use the state of a healthy checkpoint, after at least one step.",
        )
    if not bool(((moment >= 0) & (moment < math.inf)).all()):  # NaN fails both
        unknown = int((~torch.isfinite(moment)).sum())
        raise OptimizerStateError(
            f"optimizer state of {name!r} has {int((moment < 0).sum())} negative second moments and {unknown} second moments "
            "that are not finite; they are means of squares.",
            fix="use the state of a healthy checkpoint.",
        )
    first = _beside(entry.get("state1" if key == "state2" else "exp_avg"), shape)
    running = _beside(entry.get("exp_avg_sq"), shape) if amsgrad else None
    if first is not None and torch.equal(first, moment if running is None else running) and bool(first.any()):
        first = None  # FSDP1 on CPUs writes one buffer under both names when it offloads a whole state of original parameters
    return ParameterMoments(moment.detach(), step, first, running)


def _beside(moment: object, shape: tuple[int, ...]) -> Tensor | None:
    """Another moment of the parameter; None where it is none that can be used."""
    if not _is_dense(moment):
        return None
    assert isinstance(moment, Tensor)
    usable = tuple(moment.shape) == shape and bool(torch.isfinite(moment).all())
    return moment.detach() if usable else None


def check_moments(moments: Mapping[str, ParameterMoments]) -> None:
    """Refuse a state in which no element has a second moment.

    Raises:
        OptimizerStateError: parameters were stepped, and v is 0 everywhere.
    """
    if moments and not any(bool(found.second_moment.any()) for found in moments.values()):
        raise OptimizerStateError(
            f"all second moments of the {len(moments)} parameters that were stepped are 0: every gradient was 0, or the "
            "state is damaged.",
            fix="check that the loss reaches the parameters, and use the state of a healthy checkpoint.",
        )


def _is_dense(moment: object) -> bool:
    """Whether values can be read: no sparse, meta or sharded tensor, no integers and no complex numbers."""
    return (
        type(moment) in (Tensor, Parameter)
        and isinstance(moment, Tensor)
        and moment.layout == torch.strided
        and not moment.is_meta
        and moment.dtype in MOMENT_DTYPES
    )
