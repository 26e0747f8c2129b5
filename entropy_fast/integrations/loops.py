"""Forecasts in a loop of one's own: ten lines around ``optimizer.step()``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from entropy_fast.api import fast_delta_h1
from entropy_fast.columns.candidate_tables import GivenCandidate
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.integrations.looking_back import KeptPolicy, Realised
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.rollouts import Rollouts

__all__ = ["TakenStep", "forecast_step"]


@dataclasses.dataclass(eq=False)
class TakenStep:
    """A step that is being taken.

    Attributes:
        result: its forecast.
        realised: what it did to responses that were held out; None before it was taken, and without any.
    """

    result: DeltaH1Result
    realised: Realised | None = None


@contextlib.contextmanager
def forecast_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts | StepWindow,
    *,
    coefficients: Tensor | tuple[Tensor, Tensor] | None = None,
    functionals: Mapping[str, Tensor] | None = None,
    updates: Mapping[str, GivenCandidate] | None = None,
    held_out: Rollouts | None = None,
    estimate: EstimateOptions | None = None,
    run: RunOptions | None = None,
) -> Iterator[TakenStep]:
    """Forecast the step that the block takes, and measure it where responses are held out.

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with forecast_step(model, optimizer, rollouts) as step:
            optimizer.step()
        print(step.result)

    The gradient is what stands in ``.grad`` on entering, whatever loss it is of; call it after clipping and before the step.

    Args:
        model: see `fast_delta_h1`.
        optimizer: live, of any kind; also wrapped by accelerate.
        rollouts: the batch that the gradient is of; or all of it as a `StepWindow`.
        coefficients: how the gradient weighs every token, see `fast_delta_h1`; without, it is estimated how much of it is each
            prompt's own.
        functionals: see `fast_delta_h1`.
        updates: other updates to compare, see `fast_delta_h1`; of the gradient as it stands, with coefficients alone.
        held_out: responses of the policy before the step that have had no part in it; to measure what it really did.
        estimate: which entropy; None for the defaults with the live gradient.
        run: how it is run.

    Raises:
        ConfigError: coefficients or functionals beside a window, which has its own.
        Whatever `fast_delta_h1` raises, before the block is entered.
    """
    window = rollouts if isinstance(rollouts, StepWindow) else None
    if window is not None and (coefficients is not None or functionals is not None):
        raise ConfigError(
            "forecast_step: coefficients or functionals beside a StepWindow, which has its own.", fix="leave them out."
        )
    batch = rollouts.rollouts if isinstance(rollouts, StepWindow) else rollouts
    estimate = dataclasses.replace(estimate or EstimateOptions(), gradient="live", step="next")
    found = fast_delta_h1(
        model,
        optimizer,
        batch,
        coefficients=coefficients if window is None else window.coefficients,
        functionals=dict(functionals or {}) if window is None else dict(window.functionals),
        updates=updates,
        scores=None if window is None else window.scores,
        estimate=estimate,
        run=run,
    )
    kept = None if held_out is None else KeptPolicy(model)
    step = TakenStep(found)
    yield step
    if kept is not None and held_out is not None:
        step.realised = kept.change_by_step(optimizer, held_out, estimate=estimate, run=run or RunOptions())
