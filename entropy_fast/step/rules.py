"""What an optimizer makes of a gradient, taken apart: rules for one parameter at a time.

Legend: θ parameter, g gradient of the loss, λ weight decay, Δθ what the optimizer will add to θ. A rule says

    Δθ(g) = momentum + decay + fresh(g) + scale(g)

where the first two do not depend on g, fresh is linear in it, and scale is what is left: the change that g itself makes to the
optimizer's scale. For an optimizer whose step has no such linear part, all that g changes counts as fresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.adam_values import AdamGroup, ParameterMoments

__all__ = ["DECAY", "FRESH", "MOMENTUM", "PARTS", "SCALE", "AdamRule", "SgdGroup", "SgdRule", "StepRule"]

MOMENTUM, DECAY, FRESH, SCALE = PARTS = ("momentum", "decay", "fresh", "scale")


class StepRule(Protocol):
    """The step of one kind of optimizer, for parameters by their place in the registry."""

    @property
    def linear(self) -> bool:
        """Whether a part of the step is linear in the gradient."""

    def fixed(self, place: int) -> dict[str, Tensor]:
        """``momentum`` and ``decay`` of a parameter the optimizer holds, in its shape."""

    def fresh(self, place: int, gradients: Tensor) -> Tensor:
        """For gradients ``[n, *shape]`` of the loss, what they change: all of it, or the linear part of it."""

    def scale(self, place: int, gradients: Tensor) -> Tensor | None:
        """For the same, what is left; None where nothing is."""


@dataclasses.dataclass(frozen=True)
class AdamRule:
    """Adam and AdamW, with AMSGrad and ``maximize``.

    With m' = β1 m + (1 - β1) g, v' = β2 v + (1 - β2) g² and bias corrections b1' and b2' of the next step,

        Δθ = -lr (m'/b1') / (sqrt(v'/b2') + ε) - lr λ θ

    The momentum, the fresh gradient and (in the L2 form, where λθ is a part of g) the decay are divided by the stored
    sqrt(v/b2) + ε instead, as under ``adam_static``; scale is what v' makes of that. Where v is 0 there is no such
    denominator, and the whole step is counted as scale.

    Args:
        parameters: θ, in registry order.
        moments: of each; None where it was never stepped.
        groups: of each; None where the optimizer does not hold it.
        rates: lr of each.
    """

    parameters: Sequence[Tensor]
    moments: Sequence[ParameterMoments | None]
    groups: Sequence[AdamGroup | None]
    rates: Sequence[float]
    linear: bool = True
    _kept: dict[int, dict[str, Tensor]] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for moments, group in zip(self.moments, self.groups, strict=True):
            if group is not None and (group.beta1 is None or group.weight_decay is None):
                raise OptimizerStateError(
                    "the optimizer's groups have no usable betas and weight_decay, which the next step depends on.",
                    fix="use the state of a healthy checkpoint, or take step='adam_static' (--step adam_static).",
                )
            if moments is None or group is None:
                continue
            if moments.first_moment is None or (group.amsgrad and moments.running_second_moment is None):
                raise OptimizerStateError(
                    "the optimizer's state has second moments and no usable first ones (missing, not finite, or the second "
                    "ones again), which the next step is made of.",
                    fix="use the state of a healthy checkpoint, or take step='adam_static' (--step adam_static), which needs "
                    "second moments alone.",
                )

    def factor(self, place: int) -> float:
        """What the fresh gradient's step is of that under ``adam_static``: (1 - β1) / b1'; 0 where there is no step."""
        group, moments = self.groups[place], self.moments[place]
        if group is None or moments is None:
            return 0.0
        assert group.beta1 is not None
        return float((1 - group.beta1) / (1 - group.beta1 ** (moments.step + 1)))

    def fixed(self, place: int) -> dict[str, Tensor]:
        """See `StepRule.fixed`."""
        kept = self._of_last(place)
        return {MOMENTUM: kept[MOMENTUM], DECAY: kept[DECAY]}

    def _of_last(self, place: int) -> dict[str, Tensor]:
        """What does not depend on the gradient, of the parameter that was asked for last."""
        if place in self._kept:
            return self._kept[place]
        group, moments, theta, lr = self._of(place)
        static = self._static(place)
        found = {MOMENTUM: torch.zeros_like(theta), DECAY: torch.zeros_like(theta), "static": static}
        assert group.beta1 is not None and group.weight_decay is not None
        if moments is not None:
            assert moments.first_moment is not None
            first = moments.first_moment.to(theta)
            found[MOMENTUM] = -lr * group.beta1 / (1 - group.beta1 ** (moments.step + 1)) * first * static
        if group.weight_decay:
            found[DECAY] = -lr * group.weight_decay * theta
            if not group.decoupled:
                found[DECAY] *= self.factor(place) * static
        self._kept.clear()
        self._kept[place] = found
        return found

    def fresh(self, place: int, gradients: Tensor) -> Tensor:
        """See `StepRule.fresh`."""
        group, _, theta, lr = self._of(place)
        sign = -1.0 if group.maximize else 1.0
        return gradients.to(theta) * (-lr * sign * self.factor(place) * self._of_last(place)["static"])

    def scale(self, place: int, gradients: Tensor) -> Tensor:
        """See `StepRule.scale`."""
        group, moments, theta, lr = self._of(place)
        assert group.beta1 is not None and group.weight_decay is not None
        gradients = gradients.to(theta)
        seen = -gradients if group.maximize else gradients
        if group.weight_decay and not group.decoupled:
            seen = seen + group.weight_decay * theta
        step = 1.0 if moments is None else moments.step + 1
        first: Tensor = (1 - group.beta1) * seen
        second: Tensor = (1 - group.beta2) * seen.square()
        if moments is not None:
            assert moments.first_moment is not None
            running = moments.running_second_moment if group.amsgrad else moments.second_moment
            assert running is not None
            first = first + group.beta1 * moments.first_moment.to(theta)
            second = second + group.beta2 * running.to(theta)
            if group.amsgrad:
                second = torch.maximum(second, moments.second_moment.to(theta))
        denominator = second.div_(1 - group.beta2**step).sqrt_().add_(group.eps)
        # Where nothing has ever arrived and ε is 0, torch divides 0 by 0.
        moved = torch.where(first == 0, 0.0, first / denominator) * (-lr / (1 - group.beta1**step))
        fixed = self.fixed(place)
        decay = 0.0 if group.decoupled else fixed[DECAY]
        left: Tensor = moved - fixed[MOMENTUM] - decay - self.fresh(place, gradients)
        return left

    def _static(self, place: int) -> Tensor:
        """1 / (sqrt(v/b2) + ε), 0 where v is 0."""
        group, moments, theta, _ = self._of(place)
        if moments is None:
            return torch.zeros_like(theta)
        root = (moments.second_moment.to(theta) / (1 - group.beta2**moments.step)).sqrt()
        return torch.where(root > 0, 1 / (root + group.eps), 0.0)

    def _of(self, place: int) -> tuple[AdamGroup, ParameterMoments | None, Tensor, float]:
        """Group, moments, θ in fp32 or wider, lr."""
        group, theta = self.groups[place], self.parameters[place].detach()
        assert group is not None
        return group, self.moments[place], theta.to(torch.promote_types(theta.dtype, torch.float32)), self.rates[place]


@dataclasses.dataclass(frozen=True)
class SgdGroup:
    """Hyperparameters of one parameter group of SGD: its own names for them."""

    learning_rate: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


@dataclasses.dataclass(frozen=True)
class SgdRule:
    """SGD, all of it linear in g.

    With b' = μ b + (1 - dampening)(g + λθ), the first time g + λθ, Δθ = -lr b', or -lr (g + λθ + μ b') by Nesterov.

    Args:
        parameters: θ, in registry order.
        buffers: b of each; None where there is none yet.
        groups: of each; None where the optimizer does not hold it.
        rates: lr of each.
    """

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor | None]
    groups: Sequence[SgdGroup | None]
    rates: Sequence[float]
    linear: bool = True

    def factor(self, place: int) -> float:
        """What g + λθ is multiplied by beside -lr; 0 where there is no step."""
        group = self.groups[place]
        if group is None:
            return 0.0
        if group.momentum == 0:
            return 1.0
        first = 1.0 if self.buffers[place] is None else 1 - group.dampening
        return 1 + group.momentum * first if group.nesterov else first

    def fixed(self, place: int) -> dict[str, Tensor]:
        """See `StepRule.fixed`."""
        group, theta, lr = self._of(place)
        found, buffer = {MOMENTUM: torch.zeros_like(theta), DECAY: torch.zeros_like(theta)}, self.buffers[place]
        if buffer is not None and group.momentum:
            found[MOMENTUM] = -lr * group.momentum * (group.momentum if group.nesterov else 1.0) * buffer.to(theta)
        if group.weight_decay:
            found[DECAY] = -lr * self.factor(place) * group.weight_decay * theta
        return found

    def fresh(self, place: int, gradients: Tensor) -> Tensor:
        """See `StepRule.fresh`."""
        group, theta, lr = self._of(place)
        return gradients.to(theta) * (-lr * self.factor(place) * (-1.0 if group.maximize else 1.0))

    def scale(self, place: int, gradients: Tensor) -> None:
        """See `StepRule.scale`: there is nothing."""

    def _of(self, place: int) -> tuple[SgdGroup, Tensor, float]:
        """Group, θ in fp32 or wider, lr."""
        group, theta = self.groups[place], self.parameters[place].detach()
        assert group is not None
        return group, theta.to(torch.promote_types(theta.dtype, torch.float32)), self.rates[place]
