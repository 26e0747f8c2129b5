"""Adam's diagonal preconditioner, frozen at the stored second moments (geometry ``adam_static``).

P = (lr_group / lr) / (sqrt(v / (1 - β2^step)) + ε), elementwise: v is bias-corrected before the root and ε is added after
it, as torch.optim.Adam does; lr is that of the first group. Elements with v = 0 (or without state) would be divided by ε
alone, so that one untouched row could outweigh everything: they are left out and counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import GradientCoverageError, LearningRateError, OptimizerStateError
from entropy_fast.step.adam_state import AdamState
from entropy_fast.step.adam_values import check_learning_rate
from entropy_fast.step.scalars import real_number, shown

__all__ = ["AdamPreconditioner", "ExcludedElements", "SecondMoments"]


@dataclasses.dataclass(frozen=True)
class ExcludedElements:
    """Elements with a gradient but no usable second moment; they are zero in Y.

    Attributes:
        zero_moment: elements with v = 0 and g != 0.
        without_state: elements (g != 0) of parameters the optimizer holds but has never stepped.
        not_in_optimizer: elements (g != 0) of trainable parameters the optimizer does not hold.
        share: their share of ‖g‖²; exactly 1 where no element with a gradient has a second moment.
        below_eps: elements that are used, but with sqrt(v̂) < ε (counted, nothing more).
    """

    zero_moment: int
    without_state: int
    not_in_optimizer: int
    share: float
    below_eps: int


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """What `entropy_fast.ops.precondition_accumulate` needs of an optimizer, one entry per registered parameter.

    Attributes:
        tensors: v in the parameter's shape, None where there is no state.
        bias_correction: 1 / (1 - β2^step).
        eps: ε.
        ratio: the group's learning rate relative to the first group's.
    """

    tensors: list[Tensor | None]
    bias_correction: list[float]
    eps: list[float]
    ratio: list[float]


class AdamPreconditioner:
    """Maps raw gradients to Adam-preconditioned ones.

    Args:
        state: what the optimizer knows.
        registry: the parameters, in the order gradients will come in.
        learning_rate: rescales all groups alike, so that the first group has this rate; None takes the optimizer's.
        factors: by parameter, what P is multiplied by; None for 1.

    Raises:
        LearningRateError: the rate is 0, negative, not finite or below the smallest normal number, given or found; or the
            groups' rates are too far apart for one scale.
    """

    geometry = "adam_static"

    def __init__(
        self,
        state: AdamState,
        registry: ParameterRegistry,
        learning_rate: float | None = None,
        factors: Sequence[float] | None = None,
    ) -> None:
        self._state = state
        self._registry = registry
        self._versions = self._current_versions()
        self._moments: dict[tuple[torch.device, ...], SecondMoments] = {}
        self._unusual: dict[str, tuple[int, int]] = {}  # by name: elements where v is 0, and where sqrt(v̂) is below ε
        rates = [group.learning_rate for group in state.groups]
        self.learning_rate = _rate(rates[0], learning_rate)
        ratios = _ratios(rates)
        self._by_rate = [0.0 if p.group is None else ratios[p.group] for p in registry.parameters]
        self._ratios = [r * f for r, f in zip(self._by_rate, factors, strict=True)] if factors else self._by_rate

    @property
    def rates(self) -> list[float]:
        """Learning rate of every parameter; 0 where the optimizer does not hold it."""
        return [self.learning_rate * ratio for ratio in self._by_rate]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result has to know about how the optimizer's state was read."""
        return self._state.notes

    def apply_preconditioner(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """P g for one gradient per registered parameter.

        Args:
            gradients: raw gradients in registry order, each in its parameter's shape, any device.

        Returns:
            New tensors of the same dtypes and devices; zero where P is not defined.

        Raises:
            OptimizerStateError: the optimizer has stepped since this preconditioner was made.
        """
        self._check_current()
        preconditioned = []
        for gradient, scale in zip(gradients, self._scales, strict=True):
            if scale is None:
                preconditioned.append(torch.zeros_like(gradient))
            else:
                preconditioned.append(gradient * scale.to(device=gradient.device, dtype=gradient.dtype))
        return preconditioned

    def precondition_in_place(self, stacks: Sequence[Tensor]) -> None:
        """As `apply_preconditioner`, for stacks [units, *shape] of raw gradients, which become P g.

        Raises:
            OptimizerStateError: the optimizer has stepped since this preconditioner was made.
        """
        self._check_current()
        for stack, scale in zip(stacks, self._scales, strict=True):
            if scale is None:
                stack.zero_()
            else:
                stack.mul_(scale.to(device=stack.device, dtype=stack.dtype))

    def second_moments(self, gradients: Sequence[Tensor]) -> SecondMoments:
        """The second moments and factors for gradients like these, on their devices and in their dtypes.

        Args:
            gradients: one per registered parameter, in fp32 or fp64.

        Raises:
            OptimizerStateError: the optimizer has stepped since this preconditioner was made.
        """
        self._check_current()
        devices = tuple(gradient.device for gradient in gradients)
        if devices not in self._moments:
            found = SecondMoments([], [], [], [])
            for place, (parameter, gradient) in enumerate(zip(self._registry.parameters, gradients, strict=True)):
                moments = self._state.moments.get(parameter.name)
                if moments is None or parameter.group is None:
                    tensor, bias_correction, eps, ratio = None, 1.0, 1.0, 0.0
                else:
                    group = self._state.groups[parameter.group]
                    tensor = moments.second_moment.to(device=gradient.device, dtype=gradient.dtype)
                    bias_correction = 1.0 / (1.0 - math.pow(group.beta2, moments.step))
                    eps, ratio = group.eps, self._ratios[place]
                found.tensors.append(tensor)
                found.bias_correction.append(bias_correction)
                found.eps.append(eps)
                found.ratio.append(ratio)
            self._moments[devices] = found
        return self._moments[devices]

    def excluded(
        self, gradients: Sequence[Tensor], add: Callable[[Sequence[float]], Sequence[float]] = list
    ) -> ExcludedElements:
        """Count what `apply_preconditioner` leaves out of these gradients.

        Args:
            gradients: one per registered parameter.
            add: makes counts and squares over these parameters those over all, where others have more.

        Raises:
            GradientCoverageError: a gradient is not finite, so that shares of it mean nothing.
            OptimizerStateError: P is not a number that gradients can be multiplied with.
        """
        kept = lost = 0.0
        zero_moment = without_state = not_in_optimizer = below_eps = 0
        for gradient, parameter, scale in zip(gradients, self._registry.parameters, self._scales, strict=True):
            flat = gradient.reshape(-1).to(torch.float64)
            norm = float(flat @ flat)
            if not math.isfinite(norm):
                unknown = int((~torch.isfinite(flat)).sum())
                raise GradientCoverageError(
                    f"the gradient of '{parameter.name}' has "
                    + (f"{unknown} elements that are not finite" if unknown else "a norm too large for float64")
                    + f" (of {flat.numel()}); it is the first such one.",
                    fix="look for overflow in the model's backward (16-bit types, very large weights or advantages).",
                )
            if scale is None:
                lost += norm
                if parameter.group is None:
                    not_in_optimizer += int((gradient != 0).sum())
                else:
                    without_state += int((gradient != 0).sum())
                continue
            zeros, small = self._unusual[parameter.name]
            below_eps += small
            if zeros:
                root = self._root(parameter.name)
                assert root is not None
                undefined = (root == 0).to(gradient.device)
                zero_moment += int((undefined & (gradient != 0)).sum())
                lost += float(gradient[undefined].to(torch.float64).square().sum())
                kept += float(gradient[~undefined].to(torch.float64).square().sum())
            else:
                kept += norm
        lost, kept, *counts = add([lost, kept, zero_moment, without_state, not_in_optimizer, below_eps])
        zero_moment, without_state, not_in_optimizer, below_eps = map(int, counts)
        share = lost / (lost + kept) if lost > 0 else 0.0
        return ExcludedElements(zero_moment, without_state, not_in_optimizer, share, below_eps)

    @cached_property
    def _scales(self) -> list[Tensor | None]:
        """P per parameter (0 where v is 0), None for parameters without state; a group with rate 0 is really 0."""
        scales: list[Tensor | None] = []
        for place, parameter in enumerate(self._registry.parameters):
            root = self._root(parameter.name)
            if root is None or parameter.group is None:
                scales.append(None)
                continue
            group = self._state.groups[parameter.group]
            zeros = int((root == 0).sum())
            self._unusual[parameter.name] = zeros, int((root < group.eps).sum()) - zeros
            ratio = self._ratios[place]
            scale = ratio / (root + group.eps)
            usable = ((scale > 0) | (ratio == 0)) & torch.isfinite(scale)
            if not bool((usable | (root == 0)).all()):
                raise OptimizerStateError(
                    f"P of parameter '{parameter.name}' is 0 or infinite in {root.dtype} where v is not 0: v, ε = {group.eps} "
                    f"and the group's relative rate {ratio} are out of its range.",
                    fix="use the state of a healthy checkpoint.",
                )
            scales.append(torch.where(root > 0, scale, torch.zeros_like(scale)))
        return scales

    def _check_current(self) -> None:
        if self._current_versions() != self._versions:
            raise OptimizerStateError(
                "the optimizer has stepped since the probe read its second moments and step counts.",
                fix="build the probe again after every optimizer step (fast_delta_h1 does).",
            )

    def _current_versions(self) -> dict[str, int]:
        """How often each second moment has been written to; torch counts in-place changes."""
        return {name: moments.second_moment._version for name, moments in self._state.moments.items()}

    def _root(self, name: str) -> Tensor | None:
        """sqrt(v̂), in fp32 or wider."""
        moments = self._state.moments.get(name)
        if moments is None:
            return None
        group = self._state.groups[self._state.group_of[name]]
        moment = moments.second_moment
        moment = moment.to(torch.promote_types(moment.dtype, torch.float32))
        bias_correction = 1.0 - math.pow(group.beta2, moments.step)
        return (moment / bias_correction).sqrt()


def check_excluded(excluded: ExcludedElements, limit: float) -> None:
    """Raise when too much of the gradient has no second moment.

    Raises:
        GradientCoverageError: ``excluded.share`` is above ``limit``, or is 1 (whatever the limit: nothing would be estimated).
    """
    if excluded.share <= limit and excluded.share < 1:
        return
    raise GradientCoverageError(
        f"{excluded.share:.1%} of ‖g‖² sits in elements the optimizer has no second moment for ({excluded.zero_moment} with "
        f"v = 0, {excluded.without_state} never stepped, {excluded.not_in_optimizer} not in the optimizer); "
        + (
            f"the limit is {limit:.1%}."
            if excluded.share < 1
            else "that is all of it, so there is no step to estimate."
        ),
        fix="probe after the optimizer has stepped on all trainable parameters, with the optimizer that trains them. In full "
        "fine-tuning the rows of tokens not seen in training yet (embedding, position) have v = 0: freeze the embedding, probe "
        "later, or raise RunOptions.max_excluded_share if their part of the step does not matter.",
    )


def _rate(found: float, given: object) -> float:
    """The first group's rate, or the one to take in its place."""
    if given is None:
        check_learning_rate(found, "the optimizer's first group has")
        return found
    rate = real_number(given)
    if rate is None:
        raise LearningRateError(
            f"learning rate: the given value is {shown(given)}, no number.", fix="pass a number above 0."
        )
    check_learning_rate(rate, "the given value is")
    return rate


def _ratios(rates: Sequence[float]) -> list[float]:
    """Rates relative to the first group's."""
    if len(set(rates)) == 1:
        return [1.0] * len(rates)
    if rates[0] == 0:
        raise LearningRateError(
            f"the optimizer's groups have learning rates {rates}: the first is 0 and others are not, so there is no "
            "common scale for the step.",
            fix="probe at a step where the scheduler's rate is above 0.",
        )
    ratios = [rate / rates[0] for rate in rates]
    range_ = torch.finfo(torch.float32)
    if not all(ratio == 0 or range_.tiny <= ratio <= range_.max for ratio in ratios):
        raise LearningRateError(
            f"the optimizer's groups have learning rates {rates}: relative to the first some are outside of single precision.",
            fix="probe with groups whose rates are closer to one another.",
        )
    return ratios
