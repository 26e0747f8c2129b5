"""Options of forecasts in a training loop, the same for every trainer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from entropy_fast.columns.candidates import Candidate
from entropy_fast.columns.given import LossFunction
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError
from entropy_fast.integrations.forecast import StepForecast
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.rollouts import Rollouts

__all__ = ["ForecastOptions", "HeldOut", "OnForecast", "SharedHeldOut", "Verify", "forecast_options"]

Verify = Literal["previous", "held_out"] | None
OnForecast = Callable[[StepForecast], None]
HeldOut = Callable[[StepWindow, int], Rollouts]  # of so many prompts


@runtime_checkable
class SharedHeldOut(Protocol):
    """Responses that are held out, of which every rank can make its share."""

    def __call__(self, window: StepWindow, prompts: int) -> Rollouts:
        """All of them."""

    def share(self, window: StepWindow, prompts: int, rank: int, ranks: int) -> Rollouts | None:
        """Those of one rank, with group ids that no other rank's have; None where there are too few for it."""


VERIFY = ("previous", "held_out", None)


@dataclasses.dataclass(frozen=True)
class ForecastOptions:
    """How forecasts are made in a training loop.

    Attributes:
        every_n_steps: forecast one step in so many.
        budget: share of the training time that forecasts, and finding out whether they come true, may take; None for no limit.
        sample: prompts that a forecast is made from: a number, or ``auto`` for what the budget allows.
        candidates: by name other updates that are compared with the one that is taken: ready ones of `entropy_fast.candidates`,
            or loss functions of log-probs and entropies [N, T]. What each would do to the entropy beyond the update that is
            taken is in ``result.compared``.
        verify: how it is found out what a step did: ``previous`` from the responses of the window after it, for which the
            trained parameters are copied to the CPU before the step; ``held_out`` from responses that are sampled for this
            alone, before the step and of prompts that have no part in it; None not at all.
        held_out: for ``verify="held_out"``, gives such responses, of the policy as it is and of about so many prompts; the
            window it gets is that of the step. Of several ranks each calls it, and it returns the same on all of them, unless
            it is a `SharedHeldOut`. None leaves that to the trainer's integration.
        ledger: a file that forecasts and realised changes go to; None keeps them in memory.
        on_forecast: called with every forecast, once it is written down.
        estimate: which entropy, and of which policy; the gradient is always the live one. None is the mean over all response
            tokens that trainers log.
        run: how it is run; None for the defaults.

    Raises:
        ConfigError: an option cannot be used.
    """

    every_n_steps: int = 1
    budget: float | None = 0.1
    sample: int | Literal["auto"] = "auto"
    candidates: Mapping[str, Candidate | LossFunction] = dataclasses.field(default_factory=dict)
    verify: Verify = "previous"
    held_out: HeldOut | None = None
    ledger: str | os.PathLike[str] | None = None
    on_forecast: Sequence[OnForecast] = ()
    estimate: EstimateOptions | None = None
    run: RunOptions | None = None

    def __post_init__(self) -> None:
        if not _count(self.every_n_steps, 1):
            raise ConfigError(f"every_n_steps is {self.every_n_steps!r}.", fix="use a whole number from 1.")
        if self.budget is not None and not (isinstance(self.budget, (int, float)) and 0 < self.budget < math.inf):
            raise ConfigError(
                f"budget is {self.budget!r}.", fix="give a share of the training time above 0, such as 0.1, or None."
            )
        if self.sample != "auto" and not _count(self.sample, 2):
            raise ConfigError(f"sample is {self.sample!r}.", fix="use 'auto', or a whole number of prompts from 2.")
        if self.verify not in VERIFY:
            raise ConfigError(f"verify is {self.verify!r}.", fix="use 'previous', 'held_out' or None.")
        if self.held_out is not None and self.verify != "held_out":
            raise ConfigError(f"held_out with verify={self.verify!r}.", fix="pass verify='held_out', or no held_out.")
        if self.run is not None:
            self.run.refuse_checkpoint(
                "a forecast in a training loop is of a step that a later process does not come to again"
            )
        for name, candidate in self.candidates.items():
            _check_candidate(name, candidate)


def forecast_options(given: Mapping[str, Any]) -> ForecastOptions:
    """From options by name.

    Raises:
        ConfigError: there is none of a name, or one cannot be used.
    """
    known = [field.name for field in dataclasses.fields(ForecastOptions)]
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"there is no option {unknown[0]!r} of forecasts.", fix=f"use some of {', '.join(known)}.")
    return ForecastOptions(**given)


def _count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_candidate(name: object, candidate: object) -> None:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"candidates: {name!r} is no name for one.", fix="use a text.")
    if isinstance(candidate, Candidate) and candidate.options is not None:
        raise ConfigError(
            f"candidates: {name!r} changes options that describe an update ({candidate.says}), and in a training loop the "
            "update is the trainer's own loss.",
            fix="leave it out, or give it as a loss function of log-probs and entropies.",
        )
    if not isinstance(candidate, Candidate) and (isinstance(candidate, Tensor) or not callable(candidate)):
        raise ConfigError(
            f"candidates: {name!r} is a {type(candidate).__name__}.",
            fix="use one of entropy_fast.candidates, such as entropy_bonus(0.01), or a loss function.",
        )
