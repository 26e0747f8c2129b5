"""Forecasts in a training loop: before every step what it will do, after it what it did, within a share of the time.

Nothing here may disturb the training: what fails becomes a warning, once, and a NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from entropy_fast.api import fast_delta_h1
from entropy_fast.columns.candidate_tables import candidate_tables, needs_scores
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.distributed.collectives import any_of
from entropy_fast.distributed.team import Team
from entropy_fast.errors import ConfigError, EntropyFastWarning
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.integrations.forecast import StepForecast
from entropy_fast.integrations.forecast_ledger import ForecastLedger
from entropy_fast.integrations.forecast_options import ForecastOptions
from entropy_fast.integrations.looking_back import Realised, scores_of
from entropy_fast.integrations.step_window import StepWindow, with_baselines
from entropy_fast.integrations.time_budget import TimeBudget
from entropy_fast.integrations.token_shares import TokenShares
from entropy_fast.integrations.training_ranks import TrainingRanks, gathered_window, said_by_first
from entropy_fast.integrations.verification import Verification, verification_of
from entropy_fast.sharded.fsdp2 import fsdp2_modules
from entropy_fast.truth import Calibration, EntropyLedger

__all__ = ["StepForecaster"]

Keep = Callable[[int, StepWindow, DeltaH1Result], None]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a step that was forecast from so many prompts is to be looked at by, and the seconds that has taken so far."""

    step: int
    verification: Verification
    prompts: int
    seconds: float


class StepForecaster:
    """Forecasts steps of one model and optimizer.

    Args:
        model: the policy, possibly wrapped.
        optimizer: of any kind that `fast_delta_h1` takes.
        options: of forecasts; None for the defaults.
        keep: called before the step with its number, what it is made from and the forecast, to write it down for later; of
            several ranks by the first.
        ranks: of the training, which make every forecast together; None for this process by itself. All of them call the same
            methods at the same places.

    Attributes:
        options: likewise.
        stop: whether a hook on a forecast of any rank has asked for the training's end.
        time: seconds that forecasts took, and what they may take.
        on_forecast: called with every forecast, once it is written down.
        last: the last forecast; None before the first.

    Raises:
        ConfigError: ``verify="held_out"``, and nothing gives responses that are held out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: ForecastOptions | None = None,
        *,
        keep: Keep | None = None,
        ranks: TrainingRanks | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.options = options or ForecastOptions()
        if self.options.verify == "held_out" and self.options.held_out is None:
            raise ConfigError(
                "verify='held_out', and nothing gives responses that are held out.",
                fix="pass held_out, a function of the step's window and a number of prompts that returns Rollouts; or "
                "verify='previous'.",
            )
        given = self.options.estimate or EstimateOptions(weighting="pooled")
        self.estimate = dataclasses.replace(given, gradient="live", step="next")
        self.ranks = ranks or TrainingRanks()
        self.run = dataclasses.replace(self.options.run or RunOptions(), ranks="own")
        self.time = TimeBudget(self.options.budget, verified=self.options.verify is not None)
        self.on_forecast = list(self.options.on_forecast)
        self.last: StepForecast | None = None
        self.stop = False
        self._ledger, self._keep = ForecastLedger(self.options.ledger if self.ranks.first else None), keep
        self._kept: _Kept | None = None
        self._warned: set[str] = set()

    @property
    def ledger(self) -> EntropyLedger:
        """What became of the forecasts so far."""
        return self._ledger.entries

    def begin(self, step: int = 0) -> None:
        """A training begins, or goes on, after so many steps.

        What the ledger holds of later steps is of another branch: then this run gets a ledger of its own beside it.
        """
        self._kept, self.last, self.stop = None, None, False
        self.time.forget_clock()
        self._ledger.begin(step)
        for hook in self.on_forecast:
            if hasattr(hook, "begin"):
                hook.begin()

    def end(self) -> None:
        """A training ends: let go of what was kept."""
        self._kept = None
        self.ranks.leave()

    def wants(self, step: int) -> bool:
        """Whether a step of this number is one to forecast, or to look back from."""
        return step % self.options.every_n_steps == 0 or (self._kept is not None and self._kept.step == step - 1)

    def before_step(self, step: int, window: Callable[[], StepWindow]) -> StepForecast:
        """Forecast the step that is about to be taken; what fails is in the forecast's ``reason``.

        Args:
            step: how many steps were taken before it.
            window: makes what the step is made from; called at most once, and not where neither a forecast nor a look back is
                due within the time.
        """
        clock = _Clock(self.time)
        kept, self._kept = self._kept, None
        kept = kept if kept is not None and kept.step == step - 1 else None
        (reason, failed), own = self._decided(step), None
        if reason is None or (kept is not None and kept.verification.needs_window):
            own, broken = self._made(window)
            if broken is not None:
                reason, failed, self.time.attempted = broken, True, True
        building = clock.lap()
        realised, back = self._look_back(kept, own)
        if kept is not None:
            looking = building + clock.lap()
            if realised is not None:
                # A look back may have to build the window by itself.
                self.time.verifications.see(kept.prompts, kept.seconds + looking)
        kept = None  # a second copy of the parameters is made below
        result, prompts = None, None
        if own is not None and reason is None:
            result, prompts, reason, failed = self._forecast(own)
            self.time.attempted = True
        if result is not None and prompts is not None and own is not None:
            self.time.forecasts.see(prompts, building + clock.lap())
            self._write_down(step, own, result)
            clock.skip()
            self._promise(step, own, prompts, clock)
        with self.never_breaks("the ledger cannot be written"):
            if result is not None:
                self._ledger.forecast(step, result)
        clock.lap()
        calibration, seconds, used = self._known_by_now(clock.spent)
        apart = bool(fsdp2_modules(self.model))
        tokens = None if result is None or own is None or prompts is None or apart else self._tokens(own, prompts)
        found = StepForecast(
            step, result, reason, failed, realised, None if realised is not None else back, seconds, used,
            calibration, tuple(self.options.candidates), tokens,
        )  # fmt: skip
        self.last = found
        self._tell(found)
        if tokens is not None:
            tokens.close()
        clock.lap()
        return found

    def _tell(self, found: StepForecast) -> None:
        """Call the hooks; ranks stop all together or not at all."""
        for hook in self.on_forecast:
            with self.never_breaks("a hook on forecasts failed"):
                hook(found)
        if any(hasattr(hook, "wants_stop") for hook in self.on_forecast):
            with (
                self.never_breaks("ranks cannot agree whether to stop"),
                self.ranks.phase("hooks on forecasts") as team,
            ):
                self.stop = any_of(team, [any(getattr(hook, "wants_stop", False) for hook in self.on_forecast)])[0]

    def _known_by_now(self, seconds: float) -> tuple[Calibration | None, float, float]:
        """Calibration, seconds and share of the time, of the first rank, which has the ledger's file."""
        calibration, used = None, self.time.used
        with self.never_breaks("past forecasts cannot be held against what was realised"):
            calibration = self._ledger.calibration
            with self.ranks.phase("calibration") as team:
                if team.size > 1:
                    mine = None if calibration is None else dataclasses.asdict(calibration)
                    told, seconds, used = said_by_first(team, [mine, seconds, used])
                    calibration = None if told is None else Calibration(**told)
        return calibration, seconds, used

    def _decided(self, step: int) -> tuple[str | None, bool]:
        """Why a step is not forecast, and whether that is an exception."""
        try:
            with self.ranks.phase("whether to forecast") as team:
                return said_by_first(team, self._passed_over(step)), False
        except Exception as error:
            return self._failed(error), True

    def _failed(self, error: Exception) -> str:
        """Warn, and say why."""
        reason = f"{type(error).__name__}: {error}"
        self._warn(reason, error)
        return reason

    def _passed_over(self, step: int) -> str | None:
        """Why a step is not forecast, as far as that is known without its batch."""
        if step % self.options.every_n_steps:
            return f"one step in {self.options.every_n_steps} is forecast"
        if not self._moves():
            return "the learning rate is 0"
        return None if self.time.affordable else "the time budget does not allow one yet"

    def _moves(self) -> bool:
        """Whether some learning rate is not 0: schedulers begin, and end, there."""
        return any(float(group["lr"]) != 0 for group in self.optimizer.param_groups)

    def _made(self, window: Callable[[], StepWindow]) -> tuple[StepWindow | None, str | None]:
        try:
            with self.ranks.phase("the step's batch") as team:
                return with_baselines(gathered_window(team, window())), None
        except Exception as error:
            return None, self._failed(error)

    def _look_back(self, kept: _Kept | None, window: StepWindow | None) -> tuple[Realised | None, str]:
        """What the step before did; or None, and why."""
        if kept is None:
            return None, "the step before was not forecast"
        realised, back = None, "that failed"
        with self.never_breaks("what the step before did cannot be measured"), self.ranks.phase("looking back") as team:
            realised, back = kept.verification.found(self.optimizer, window, team)
        with self.never_breaks("what the step before did cannot be written down"):
            if realised is not None:
                self._ledger.realised(kept.step, realised)
        return realised, back

    def _forecast(self, window: StepWindow) -> tuple[DeltaH1Result | None, int | None, str | None, bool]:
        """A forecast, of how many prompts; or why there is none, and whether that is an exception."""
        try:
            with self.ranks.phase("the forecast") as team:
                prompts, reason = said_by_first(team, self._sample_of(window))
                if prompts is None:
                    return None, None, reason, False
                return self._made_from(window, prompts, team), prompts, None, False
        except Exception as error:
            return None, None, self._failed(error), True

    def _sample_of(self, window: StepWindow) -> tuple[int | None, str | None]:
        """From how many prompts; or None, and why."""
        if window.skipped is not None:
            return None, window.skipped
        available = len(set(window.rollouts.prompt_index[window.rollouts.response_lengths > 0].tolist()))
        if available < 2:
            return None, f"{available} prompts of the step have responses that count in its loss"
        if self.options.sample == "auto":
            prompts = self.time.prompts(available)
        else:
            asked = min(self.options.sample, available)
            prompts = self.time.prompts(asked, least=asked)
        return prompts, None if prompts is not None else "the time budget does not allow one yet"

    def _made_from(self, window: StepWindow, prompts: int, team: Team) -> DeltaH1Result:
        updates = self._other_updates(window, team)
        run = dataclasses.replace(self.run, ranks="all" if self.ranks.together else "own")
        estimate = dataclasses.replace(self.estimate, sample=max(2, prompts))
        return self._probed(window, estimate, run, updates, team)

    def _probed(
        self,
        window: StepWindow,
        estimate: EstimateOptions,
        run: RunOptions,
        updates: dict[str, tuple[Tensor, Tensor]],
        team: Team | None = None,
    ) -> DeltaH1Result:
        with warnings.catch_warnings():
            # They are in the result's diagnostics; a training loop would print them at every step.
            warnings.simplefilter("ignore", EntropyFastWarning)
            return fast_delta_h1(
                self.model,
                self.optimizer,
                window.rollouts,
                coefficients=window.coefficients,
                functionals=dict(window.functionals),
                updates=updates,
                scores=window.scores,
                estimate=estimate,
                run=run,
                team=team,
            )

    def _other_updates(self, window: StepWindow, team: Team) -> dict[str, tuple[Tensor, Tensor]]:
        """Candidates as coefficients of the gradient as it would stand, clipped as this one; those that can be worked out."""
        candidates = self.options.candidates
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if not candidates:
            return {}
        scores = window.scores
        if scores is None and needs_scores(candidates):
            estimate = dataclasses.replace(self.estimate, sample=None)
            scores = scores_of(self.model, self.optimizer, window.rollouts, estimate=estimate, run=self.run, team=team)
        for name, candidate in candidates.items():
            with self.never_breaks(f"the candidate {name!r} cannot be worked out"):
                found |= candidate_tables(
                    {name: candidate}, window.coefficients, scores, window.rollouts, self.estimate, window.clip
                )
        return found

    def _tokens(self, window: StepWindow, prompts: int) -> TokenShares:
        def forecast() -> DeltaH1Result:
            estimate = dataclasses.replace(self.estimate, sample=max(2, prompts), parts=("direct",))
            bare = dataclasses.replace(window, functionals={})
            return self._probed(bare, estimate, dataclasses.replace(self.run, by_token=True), {})

        return TokenShares(forecast, window.rollouts, window.decode)

    def _write_down(self, step: int, window: StepWindow, result: DeltaH1Result) -> None:
        """Keep the step for later, where that is asked for."""
        if self._keep is not None and self.ranks.first:
            with self.never_breaks("a step cannot be kept"):
                self._keep(step, window, result)

    def _promise(self, step: int, window: StepWindow, prompts: int, clock: _Clock) -> None:
        """Keep what the step is to be looked at by."""
        with self.never_breaks("nothing can be kept to find out what the step does"):
            with self.ranks.phase("keeping the policy") as team:
                found = verification_of(
                    self.options, self.model, self.optimizer, window, prompts, self.estimate, self.run, team
                )
            seconds = clock.lap()
            if found is not None:
                self._kept = _Kept(step, found, prompts, seconds)

    @contextlib.contextmanager
    def never_breaks(self, what: str) -> Iterator[None]:
        """An exception in the block is one warning, that ``what`` went wrong and why."""
        try:
            yield
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}", error, what)

    def _warn(self, reason: str, error: Exception, what: str = "no forecast") -> None:
        """Once for every kind of failure, with where it happened; by the rank that failed, and by the first."""
        if not self.ranks.says(error):
            return
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


class _Clock:
    """Seconds of one call, taken off the budget as they go by."""

    def __init__(self, budget: TimeBudget) -> None:
        self._budget, self._since, self.spent = budget, time.perf_counter(), 0.0

    def lap(self) -> float:
        """Seconds since the last time, spent on forecasts."""
        seconds = self.skip()
        self.spent += seconds
        self._budget.spend(seconds)
        return seconds

    def skip(self) -> float:
        """Seconds since the last time, spent on something else."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
