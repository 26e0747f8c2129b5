"""Forecasts in a training loop: before every step what it will do, after it what it did, within a share of the time.

Nothing here may disturb the training: what fails becomes a warning, once, and a NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from entropy_fast.api import fast_delta_h1
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError, EntropyFastWarning
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.integrations.forecast import StepForecast
from entropy_fast.integrations.looking_back import KeptPolicy, Realised
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.integrations.time_budget import TimeBudget
from entropy_fast.rollouts import Rollouts
from entropy_fast.truth import EntropyLedger

__all__ = ["OnForecast", "StepForecaster", "Verify"]

Verify = Literal["previous"] | None
OnForecast = Callable[[StepForecast], None]
Keep = Callable[[int, StepWindow, DeltaH1Result], None]
ROLLING = 50  # steps that slope and coverage look back on
FEWEST_TO_VERIFY = 2  # prompts


class StepForecaster:
    """Forecasts steps of one model and optimizer.

    Args:
        model: the policy, possibly wrapped.
        optimizer: of any kind that `fast_delta_h1` takes.
        estimate: which entropy, and of which policy; the gradient is always the live one. None is the mean over all response
            tokens that trainers log.
        run: how it is run.
        every_n_steps: forecast one step in so many.
        budget: share of the training time that forecasts may take; None for no limit.
        sample: prompts that a forecast is made from: a number, or ``auto`` for what the budget allows.
        verify: ``previous`` measures what a step did on the responses of the window after it; None does not.
        ledger: a file that forecasts and realised changes go to; None keeps them in memory.
        on_forecast: called with every forecast, once it is written down.
        keep: called before the step with its number, what it is made from and the forecast, to write it down for later.

    Attributes:
        ledger: what became of the forecasts so far.
        time: seconds that they took.
        last: the last forecast; None before the first.

    Raises:
        ConfigError: an option cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        estimate: EstimateOptions | None = None,
        run: RunOptions | None = None,
        every_n_steps: int = 1,
        budget: float | None = 0.1,
        sample: int | Literal["auto"] = "auto",
        verify: Verify = "previous",
        ledger: str | os.PathLike[str] | None = None,
        on_forecast: Sequence[OnForecast] = (),
        keep: Keep | None = None,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigError(f"every_n_steps is {every_n_steps!r}.", fix="use a whole number from 1.")
        if sample != "auto" and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 2):
            raise ConfigError(f"sample is {sample!r}.", fix="use 'auto', or a whole number of prompts from 2.")
        if verify not in ("previous", None):
            raise ConfigError(f"verify is {verify!r}.", fix="use 'previous' or None.")
        self.model, self.optimizer = model, optimizer
        given = estimate or EstimateOptions(weighting="pooled")
        self.estimate = dataclasses.replace(given, gradient="live", step="next")
        self.run = run or RunOptions()
        self.every_n_steps, self.sample, self.verify = every_n_steps, sample, verify
        self.ledger = EntropyLedger(ledger)
        self.time = TimeBudget(budget)
        self.on_forecast, self._keep = list(on_forecast), keep
        self.last: StepForecast | None = None
        self._kept: tuple[int, KeptPolicy] | None = None  # the policy before the step of that number
        self._warned: set[str] = set()

    def wants(self, step: int) -> bool:
        """Whether a step of this number is one to forecast."""
        return step % self.every_n_steps == 0

    def before_step(self, step: int, window: Callable[[], StepWindow]) -> StepForecast:
        """Forecast the step that is about to be taken; what fails is in the forecast's ``reason``.

        Args:
            step: how many steps were taken before it.
            window: makes what the step is made from; called at most once, and not where the time does not allow a forecast.
        """
        started = time.perf_counter()
        kept, self._kept = self._kept, None
        result: DeltaH1Result | None = None
        realised: Realised | None = None
        reason: str | None = None
        back: str | None = "the step before was not forecast"
        failed, prompts = False, None
        try:
            own = window()
            with_responses = set(own.rollouts.prompt_index[own.rollouts.response_lengths > 0].tolist())
            prompts = self._prompts(len(with_responses))
            if len(with_responses) < 2 or not self._moves():
                prompts = None
                reason = (
                    f"{len(with_responses)} prompts of the step have responses that count in its loss"
                    if self._moves()
                    else "the learning rate is 0"
                )
                realised, back = self._look_back(step, kept, own, 2)
            elif prompts is None:
                reason = back = "the time budget does not allow one yet"
            else:
                # Order matters: what the step before did is measured even where this step cannot be forecast.
                realised, back = self._look_back(step, kept, own, prompts)
                result = self._forecast(own, prompts)
                if self._keep is not None:
                    with self._never_breaks("a step cannot be kept"):
                        self._keep(step, own, result)
        except Exception as error:
            failed, reason = True, f"{type(error).__name__}: {error}"
            self._warn(reason)
        with self._never_breaks("the ledger cannot be written"):
            self._note(step, result, realised)
            if result is not None and self.verify is not None:
                self._kept = (step, KeptPolicy(self.model))
        seconds = time.perf_counter() - started
        self.time.spend(seconds, prompts if result is not None else None)
        calibration = self.ledger.calibration("total", window=ROLLING)
        forecast = StepForecast(
            step,
            result,
            reason,
            failed,
            realised,
            back,
            seconds,
            self.time.used,
            calibration if calibration.n else None,
        )
        self.last = forecast
        for hook in self.on_forecast:
            with self._never_breaks("a hook on forecasts failed"):
                hook(forecast)
        return forecast

    def _moves(self) -> bool:
        """Whether some learning rate is not 0: schedulers begin, and end, there."""
        return any(float(group["lr"]) != 0 for group in self.optimizer.param_groups)

    def _prompts(self, available: int) -> int | None:
        allowed = self.time.prompts(available)
        if allowed is None or self.sample == "auto":
            return allowed
        return min(self.sample, available)

    def _forecast(self, window: StepWindow, prompts: int) -> DeltaH1Result:
        estimate = dataclasses.replace(self.estimate, sample=max(2, prompts))
        with warnings.catch_warnings():
            # They are in the result's diagnostics; a training loop would print them at every step.
            warnings.simplefilter("ignore", EntropyFastWarning)
            return fast_delta_h1(
                self.model,
                self.optimizer,
                window.rollouts,
                coefficients=window.coefficients,
                functionals=dict(window.functionals),
                scores=window.scores,
                estimate=estimate,
                run=self.run,
            )

    def _look_back(
        self, step: int, kept: tuple[int, KeptPolicy] | None, window: StepWindow, prompts: int
    ) -> tuple[Realised | None, str | None]:
        """What the step before did; or None, and why."""
        if self.verify is None:
            return None, "verify is off"
        if kept is None or kept[0] != step - 1:
            return None, "the step before was not forecast"
        if window.on_policy is None:
            return None, "nothing says whether the responses were sampled after the step"
        usable = window.on_policy.cpu() & (window.rollouts.response_lengths > 0)
        whole = [n for n in range(window.rollouts.n_prompts) if bool(usable[window.rollouts.rows_of_prompt(n)].all())]
        if len(whole) < FEWEST_TO_VERIFY:
            return None, "the responses were not all sampled after the step, or they have had a part in it"
        rows = torch.cat([window.rollouts.rows_of_prompt(n) for n in whole[: max(FEWEST_TO_VERIFY, prompts)]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EntropyFastWarning)
            found = kept[1].change_since(
                self.optimizer, _rows(window.rollouts, rows), estimate=self.estimate, run=self.run
            )
        return found, None

    def _note(self, step: int, result: DeltaH1Result | None, realised: Realised | None) -> None:
        """Write forecast and realised change down."""
        if realised is not None:
            self.ledger.realise(step - 1, "total", realised.total, realised.total_error)
            self.ledger.realise(step - 1, "direct", realised.direct, realised.direct_error)
        if result is None:
            return
        parts = {"total": (result.delta_h1, result.std_error)}
        if result.split is not None:
            for name in ("direct", "visitation"):
                own = getattr(result.split, name)
                parts[name] = own.value, own.std_error
        for name, (value, error) in parts.items():
            self.ledger.record(
                step, part=name, forecast=value, std_error=error, learning_rate=result.learning_rate, unit=result.unit
            )

    @contextlib.contextmanager
    def _never_breaks(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}", what)

    def _warn(self, reason: str, what: str = "no forecast") -> None:
        """Once for every kind of failure, with where it happened."""
        kind = f"{what}, {reason.partition(':')[0]}"
        if kind in self._warned:
            return
        self._warned.add(kind)
        where = traceback.format_exc(limit=-2)
        with contextlib.suppress(Exception):  # warnings may have been made errors: they must not end the training
            warnings.warn(
                f"entropy_fast: {what} ({reason}). Training goes on; what is not known is NaN.\n{where}",
                EntropyFastWarning,
                stacklevel=2,
            )


def _rows(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    return rollouts if len(rows) == rollouts.n_sequences else rollouts.select_rows(rows)
