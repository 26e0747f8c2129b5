"""The step that the optimizer will really take: Δθ at a gradient, taken apart.

Legend: g gradient of the loss, B prompts, Δθ(g) what the optimizer will add to the parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError, OptimizerStateError
from entropy_fast.step.dry_run import DryRun
from entropy_fast.step.rules import DECAY, FRESH, MOMENTUM, SCALE, StepRule

__all__ = ["DryRunRule", "NextStep", "clip_factor"]

CLIP_EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


class DryRunRule:
    """A rule for any optimizer, from steps on copies: with and without a gradient, with and without decay.

    All that the gradient changes is fresh, since nothing says which of it is linear.

    Args:
        dry: of the optimizer.
        parameters: in registry order.
        scale: what every step is multiplied by, for another learning rate than the optimizer's.
    """

    linear = False

    def __init__(self, dry: DryRun, parameters: Sequence[Tensor], scale: float) -> None:
        self._dry, self._parameters, self._scale = dry, list(parameters), scale
        # Quantised states cannot be widened.
        self._wide = not type(dry.optimizer).__module__.startswith("bitsandbytes")

    @cached_property
    def _without_gradient(self) -> dict[int, dict[str, Tensor]]:
        zeros = [torch.zeros_like(p) for p in self._parameters]
        found = {}
        bare = dict(self._dry.steps(zeros, decay=False, wide=self._wide))
        for place, whole in self._dry.steps(zeros, wide=self._wide):
            found[place] = {MOMENTUM: self._scale * bare[place], DECAY: self._scale * (whole - bare[place])}
        return found

    def fixed(self, place: int) -> dict[str, Tensor]:
        """See `StepRule.fixed`."""
        return self._without_gradient[place]

    def fresh(self, place: int, gradients: Tensor) -> Tensor:
        """See `StepRule.fresh`."""
        fixed = self.fixed(place)
        nothing: list[Tensor | None] = [None] * len(self._parameters)
        steps = []
        for gradient in gradients:
            ((_, moved),) = self._dry.steps([*nothing[:place], gradient, *nothing[place + 1 :]], wide=self._wide)
            steps.append(self._scale * moved - fixed[MOMENTUM] - fixed[DECAY])
        return torch.stack(steps)

    def scale(self, place: int, gradients: Tensor) -> None:
        """See `StepRule.scale`: nothing is known apart."""


@dataclasses.dataclass(frozen=True)
class NextStep:
    """Δθ of the optimizer's next step, as a function of the gradient it will see.

    Attributes:
        rule: of the optimizer.
        held: for every registered parameter whether the optimizer has it.
        learning_rate: the first group's.
        ascends: whether the optimizer has ``maximize`` set, so that what is backpropagated is the objective itself.
        max_grad_norm: limit of the gradient's norm, over all parameters; None for none.
        live: the gradient as it stands in ``.grad``, one per parameter; None to take it from the rollouts.
        dry: steps on copies; None where the state came from a file.
    """

    rule: StepRule
    held: tuple[bool, ...]
    learning_rate: float
    ascends: bool = False
    max_grad_norm: float | None = None
    live: tuple[Tensor | None, ...] | None = None
    dry: DryRun | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """What the step is made of; without ``scale`` where nothing says which change is linear in the gradient."""
        return (MOMENTUM, DECAY, FRESH, SCALE) if self.rule.linear else (MOMENTUM, DECAY, FRESH)

    def of(self, gradients: Sequence[Tensor | None]) -> list[dict[str, Tensor] | None]:
        """Δθ by part, for one gradient of the loss per parameter; None for a parameter that stays as it is."""
        return [
            None if gradient is None or not self.held[place] else self.of_parameter(place, gradient)
            for place, gradient in enumerate(gradients)
        ]

    def of_parameter(self, place: int, gradient: Tensor) -> dict[str, Tensor]:
        """Likewise of one that moves."""
        one = gradient.unsqueeze(0)
        found = {**self.rule.fixed(place), FRESH: self.rule.fresh(place, one)[0]}
        if self.rule.linear:
            scale = self.rule.scale(place, one)
            found[SCALE] = torch.zeros_like(found[FRESH]) if scale is None else scale[0]
        return found

    def exactly(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Δθ as the optimizer's own code makes it, where it is live and at its own learning rate; else the sum of the parts."""
        if self.dry is None:
            return [None if parts is None else sum(parts.values(), torch.zeros(())) for parts in self.of(gradients)]
        found: list[Tensor | None] = [None] * len(gradients)
        for place, moved in self.dry.steps(gradients):
            found[place] = moved
        return found


def clip_factor(
    gradients: Sequence[Tensor | None],
    most: float | None,
    add: Callable[[Sequence[float]], Sequence[float]] = list,
) -> float:
    """What clipping by the global norm multiplies gradients by, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        gradients: one per parameter; None where none arrived.
        most: limit of the norm; None for none.
        add: makes sums over these parameters those over all, where others have more.

    Raises:
        OptimizerStateError: the norm is not finite.
    """
    if most is None:
        return 1.0
    squares = [float(g.double().square().sum()) for g in gradients if g is not None]
    norm = math.sqrt(add([sum(squares)])[0])
    if not math.isfinite(norm):
        raise OptimizerStateError(
            f"the gradient's norm is {norm}, so it cannot be clipped.", fix="look for overflow in the model's backward."
        )
    return min(1.0, most / (norm + CLIP_EPS))


def live_gradients(parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The parameters' ``.grad`` as they stand.

    Raises:
        ConfigError: there are none.
    """
    found = tuple(None if p.grad is None else p.grad.detach() for p in parameters)
    if all(gradient is None for gradient in found):
        raise ConfigError(
            "gradient='live' and no trainable parameter has a .grad.",
            fix="call it after backward() and before optimizer.step() and zero_grad(); or take gradient='rollouts'.",
        )
    return found
