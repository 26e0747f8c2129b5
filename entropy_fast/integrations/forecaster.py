"""Forecasts in a training loop: before every step what it will do, after it what it did, within a share of the time.

Nothing here may disturb the training: what fails becomes a warning, once, and a NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
from entropy_fast.truth import Calibration, EntropyLedger

__all__ = ["OnForecast", "StepForecaster", "Verify"]

Verify = Literal["previous"] | None
OnForecast = Callable[[StepForecast], None]
Keep = Callable[[int, StepWindow, DeltaH1Result], None]
ROLLING = 50  # steps that slope and coverage look back on
FEWEST_TO_VERIFY = 2  # prompts


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The policy before a step that was forecast from so many prompts."""

    step: int
    policy: KeptPolicy
    prompts: int


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
        verify: ``previous`` measures what a step did on the responses of the window after it, for which the trained parameters
            are copied to the CPU before the step; None does not.
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
        self._kept: _Kept | None = None
        self._warned: set[str] = set()

    def begin(self, step: int = 0) -> None:
        """A training begins, or goes on, after so many steps.

        What the ledger holds of later steps is of another branch: then this run gets a ledger of its own beside it.
        """
        self._kept, self.last = None, None
        self.time.forget_clock()
        if any(row.step >= step for row in self.ledger.rows()):
            self.ledger = EntropyLedger(None if self.ledger.path is None else _beside(self.ledger.path, step))
        for hook in self.on_forecast:
            if hasattr(hook, "begin"):
                hook.begin()

    def end(self) -> None:
        """A training ends: let go of what was kept."""
        self._kept = None

    def wants(self, step: int) -> bool:
        """Whether a step of this number is one to forecast, or to look back from."""
        return step % self.every_n_steps == 0 or (self._kept is not None and self._kept.step == step - 1)

    def before_step(self, step: int, window: Callable[[], StepWindow]) -> StepForecast:
        """Forecast the step that is about to be taken; what fails is in the forecast's ``reason``.

        Args:
            step: how many steps were taken before it.
            window: makes what the step is made from; called at most once, and not where neither a forecast nor a look back is
                due within the time.
        """
        started, keeping = time.perf_counter(), 0.0
        kept, self._kept = self._kept, None
        if kept is not None and kept.step != step - 1:
            kept = None
        result: DeltaH1Result | None = None
        realised: Realised | None = None
        reason, back, prompts = self._passed_over(step), "the step before was not forecast", None
        failed = False
        try:
            own = window() if reason is None or kept is not None else None
            if own is not None and kept is not None:
                with self.never_breaks("what the step before did cannot be measured"):
                    realised, back = self._look_back(kept, own)
            kept = None  # a second copy of the parameters is made below
            if own is not None and reason is None:
                prompts, reason = self._sample_of(own)
                if prompts is not None:
                    result = self._forecast(own, prompts)
                    keeping = self._write_down(step, own, result)
        except Exception as error:
            failed, reason = True, f"{type(error).__name__}: {error}"
            self._warn(reason)
        with self.never_breaks("what the step before did cannot be written down"):
            self._note_realised(step, realised)
        with self.never_breaks("the ledger cannot be written"):
            self._note_forecast(step, result)
        with self.never_breaks("the policy cannot be kept"):
            if result is not None and prompts is not None and self.verify is not None:
                self._kept = _Kept(step, KeptPolicy(self.model), prompts)
        seconds = time.perf_counter() - started
        self.time.spend(seconds - keeping, prompts if result is not None else None)
        calibration: Calibration | None = None
        with self.never_breaks("past forecasts cannot be held against what was realised"):
            calibration = self.ledger.calibration("direct", window=ROLLING)
        found = StepForecast(
            step, result, reason, failed, realised, None if realised is not None else back, seconds, self.time.used,
            calibration if calibration is not None and calibration.n else None,
        )  # fmt: skip
        self.last = found
        for hook in self.on_forecast:
            with self.never_breaks("a hook on forecasts failed"):
                hook(found)
        return found

    def _passed_over(self, step: int) -> str | None:
        """Why a step is not forecast, as far as that is known without its batch."""
        if step % self.every_n_steps:
            return f"one step in {self.every_n_steps} is forecast"
        if not self._moves():
            return "the learning rate is 0"
        return None if self.time.affordable else "the time budget does not allow one yet"

    def _sample_of(self, window: StepWindow) -> tuple[int | None, str | None]:
        """From how many prompts; or None, and why."""
        if window.skipped is not None:
            return None, window.skipped
        available = len(set(window.rollouts.prompt_index[window.rollouts.response_lengths > 0].tolist()))
        if available < 2:
            return None, f"{available} prompts of the step have responses that count in its loss"
        prompts = self._prompts(available)
        return prompts, None if prompts is not None else "the time budget does not allow one yet"

    def _write_down(self, step: int, window: StepWindow, result: DeltaH1Result) -> float:
        """Keep the step for later, where that is asked for; seconds it took, which are not a forecast's."""
        if self._keep is None:
            return 0.0
        started = time.perf_counter()
        with self.never_breaks("a step cannot be kept"):
            self._keep(step, window, result)
        return time.perf_counter() - started

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

    def _look_back(self, kept: _Kept, window: StepWindow) -> tuple[Realised | None, str]:
        """What the step before did; or None, and why."""
        if window.on_policy is None:
            return None, "nothing says whether the responses were sampled after the step"
        usable = window.on_policy.cpu() & (window.rollouts.response_lengths > 0)
        chosen = []
        for prompt in range(window.rollouts.n_prompts):
            rows = window.rollouts.rows_of_prompt(prompt)
            rows = rows[window.rollouts.response_lengths[rows] > 0]
            # One response alone has no others of its prompt to be weighed against.
            if len(rows) > 1 and bool(usable[rows].all()):
                chosen.append(rows)
        if len(chosen) < FEWEST_TO_VERIFY:
            return None, "too few prompts have two responses or more that were sampled after the step"
        rows = torch.cat(chosen[: max(FEWEST_TO_VERIFY, kept.prompts)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EntropyFastWarning)
            found = kept.policy.change_since(
                self.optimizer, _rows(window.rollouts, rows), estimate=self.estimate, run=self.run
            )
        if self.estimate.wanted_parts == ("direct",):
            # Responses of a truncated policy are weighed by what they were not drawn from.
            found = dataclasses.replace(found, total=math.nan, total_error=math.nan)
        return found, ""

    def _note_realised(self, step: int, realised: Realised | None) -> None:
        if realised is None:
            return
        known = {(row.step, row.part) for row in self.ledger.rows()}
        for part, value, error in (
            ("total", realised.total, realised.total_error),
            ("direct", realised.direct, realised.direct_error),
        ):
            if math.isfinite(value) and (step - 1, part) in known:
                self.ledger.realise(step - 1, part, value, error)

    def _note_forecast(self, step: int, result: DeltaH1Result | None) -> None:
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
    def never_breaks(self, what: str) -> Iterator[None]:
        """An exception in the block is one warning, that ``what`` went wrong and why."""
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


def _beside(path: Path, step: int) -> Path:
    """A name for a ledger that goes on from a step, which no file has."""
    for count in itertools.count(1):
        found = path.with_name(f"{path.stem}.from-{step}{'' if count == 1 else f'-{count}'}{path.suffix}")
        if not found.exists():
            return found
    raise AssertionError("counting has an end")


def _rows(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    return rollouts if len(rows) == rollouts.n_sequences else rollouts.select_rows(rows)
