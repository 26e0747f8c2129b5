"""The same responses scored again after a step: the change of their mean entropy at prefixes that stay as they are.

Legend: Ȳ the mean of the prompts' preconditioned update gradients, θ the parameters, η a learning rate, E(θ) the mean entropy
of a batch at its fixed prefixes, as `EntropyMeasure` weighs it. A forecast `on_batch` is η · dE(θ + ηȲ)/dη at 0; found is

    forward = E(θ + ηȲ) - E(θ),      symmetric = (E(θ + ηȲ) - E(θ - ηȲ)) / 2

The second is free of the curvature along the step, which is why it agrees at steps at which the first does not.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from entropy_fast.checks.exclusive import one_probe_at_a_time
from entropy_fast.columns import Wanted, columns_of
from entropy_fast.columns.wanted import entropy_measure
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.context import ProbeContext
from entropy_fast.engines.one_pass import OnePassEngine
from entropy_fast.errors import LearningRateError
from entropy_fast.rollouts import Rollouts
from entropy_fast.step import AdamState, adam_state_of

__all__ = ["Rescored", "rescored_entropy"]


@dataclasses.dataclass(frozen=True)
class Rescored:
    """What a step did to a batch's mean entropy at its own prefixes, in the unit of the result it is held against.

    Attributes:
        learning_rate: η.
        forward: E(θ + ηȲ) - E(θ).
        symmetric: (E(θ + ηȲ) - E(θ - ηȲ)) / 2.
    """

    learning_rate: float
    forward: float
    symmetric: float


def rescored_entropy(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | AdamState | str | os.PathLike[str],
    rollouts: Rollouts,
    learning_rates: Sequence[float],
    *,
    estimate: EstimateOptions | None = None,
    run: RunOptions | None = None,
) -> list[Rescored]:
    """Take the step lr · Ȳ of the described update on the model, score the batch, and put the parameters back bit by bit.

    Args:
        model: see `fast_delta_h1`.
        optimizer: likewise; its own learning rate is not used.
        rollouts: the batch, which the update is made from and whose entropy is looked at.
        learning_rates: η of every step.
        estimate: which entropy and which update; its own learning rate is not used.
        run: how it is run, by the one-pass engine.

    Raises:
        LearningRateError: a learning rate is not above 0.
        GradientCoverageError, RolloutsError, ModelStateError: see `fast_delta_h1`.
    """
    if not all(rate > 0 for rate in learning_rates):
        raise LearningRateError(f"rescoring: learning rates are {list(learning_rates)}.", fix="use numbers above 0.")
    state = adam_state_of(optimizer, model)
    context = ProbeContext.of(model, state, dataclasses.replace(estimate or EstimateOptions(), learning_rate=1.0), run)
    context = dataclasses.replace(context, columns=columns_of(context.estimate, Wanted(), rollouts, rollouts))
    batch = rollouts.for_autograd().without_empty_responses()[0]
    measure = entropy_measure(context.estimate, Wanted(), None)

    def level() -> float:
        scores = OnePassEngine(context).score(batch)
        return measure.level(batch, scores.entropies.double().cpu().sum(-1))

    parameters = context.registry.tensors
    with one_probe_at_a_time(wait=context.run.when_busy == "wait"):
        step = [y / batch.n_prompts for y in OnePassEngine(context).update_sum(batch).tensors]
        before = level()
        kept = [p.detach().clone() for p in parameters]
        found = []
        try:
            for rate in learning_rates:
                levels = []
                for eta in (rate, -rate):
                    _move(parameters, kept, step, eta)
                    if all(torch.equal(p, own) for p, own in zip(parameters, kept, strict=True)):
                        raise LearningRateError(
                            f"rescoring: a step at learning rate {rate:g} moves no parameter of {parameters[0].dtype}.",
                            fix="use a larger learning rate, or parameters in float32.",
                        )
                    levels.append(level())
                found.append(Rescored(rate, levels[0] - before, (levels[0] - levels[1]) / 2))
        finally:
            _move(parameters, kept, step, 0.0)
    return found


def _move(parameters: Sequence[Tensor], kept: Sequence[Tensor], step: Sequence[Tensor], eta: float) -> None:
    """Put every parameter where it was, and ``eta`` times the step from there."""
    with torch.no_grad():
        for parameter, own, along in zip(parameters, kept, step, strict=True):
            parameter.copy_(own)
            if eta:
                parameter.add_(along.to(device=parameter.device, dtype=parameter.dtype), alpha=eta)
