"""A warning before the entropy has fallen, from forecasts of the steps so far.

Legend: H entropy now, δ_i forecast of step i with standard error σ_i, m forecasts looked back on, k steps ahead.

The fall a step is taken to go on as it was over the last m forecasts: δ̄ = Σ δ_i / m. Its error is the larger of two, what the
forecasts know of themselves, √(Σ σ_i²) / m, and how much they differ from step to step, sd(δ) / √m. The warning is given where

    H + k (δ̄ + t_95 · error) < floor

with t_95 Student's one-sided 95 % quantile on m - 1 degrees of freedom: where even the upper bound of where entropy goes lies
below the floor within k steps.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch.distributed as dist
from scipy.stats import t as student_t

from entropy_fast.errors import ConfigError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.integrations.forecast import StepForecast

__all__ = ["EntropyFloor", "EntropyWarning"]

FEWEST = 3  # forecasts that a warning is made from
NAMED = 3  # prompts, and tokens, that are named
SHOWN = 60  # characters of a prompt
SURE = 0.95

log = logging.getLogger("entropy_fast")


@dataclasses.dataclass(frozen=True)
class EntropyWarning:
    """Why entropy is expected to fall below the floor.

    Attributes:
        step: before which the warning is given.
        level: entropy now, nats in the forecasts' unit.
        floor: what it is expected to fall below.
        within: steps.
        change: mean forecast of a step; change_error: its standard error.
        prompts: which prompts lower it most by the last forecast, and by how much each.
        tokens: which tokens' distributions it narrows most, likewise in the direct part: text, and the sum of the shares of all
            its occurrences; empty where tokens are not known.
        unit: of all of them.
    """

    step: int
    level: float
    floor: float
    within: int
    change: float
    change_error: float
    prompts: tuple[tuple[str, float], ...]
    tokens: tuple[tuple[str, float], ...]
    unit: str

    def __str__(self) -> str:
        named, tokens = (
            ", ".join(f"{name} ({share:+.2g})" for name, share in found) for found in (self.prompts, self.tokens)
        )
        where = f" Tokens where it is lowered most: {tokens}." if tokens else ""
        return (
            f"before step {self.step}: entropy is {self.level:.3g} {self.unit} and is forecast to change by "
            f"{self.change:+.3g} ± {self.change_error:.2g} a step, so at 95 % it falls below {self.floor:g} within "
            f"{self.within} steps. Prompts that lower it most: {named or 'none by itself'}.{where}"
        )


class EntropyFloor:
    """Warns when forecasts say that entropy falls below a level soon; one of `StepForecaster`'s ``on_forecast``.

    Args:
        floor: nats, in the forecasts' unit.
        within: k, steps.
        part: ``direct``, which is known far better, or ``total``.
        last: m, forecasts looked back on.
        on_warning: called with every warning, by every rank of a training; None has the first one log it (logger
            ``entropy_fast``).
        again_after: steps without another warning after one.
        stop: ask the training to stop after the step that a warning is given before.

    Attributes:
        warnings: given so far.
        wants_stop: whether the training should stop; `EntropyForecastCallback` asks.

    Raises:
        ConfigError: an option cannot be used.
    """

    def __init__(
        self,
        floor: float,
        within: int = 50,
        *,
        part: Literal["direct", "total"] = "direct",
        last: int = 8,
        on_warning: Callable[[EntropyWarning], None] | None = None,
        again_after: int = 50,
        stop: bool = False,
    ) -> None:
        if not 0 <= floor < math.inf or within < 1 or last < FEWEST or part not in ("direct", "total"):
            raise ConfigError(
                f"EntropyFloor: floor={floor!r}, within={within!r}, last={last!r}, part={part!r}.",
                fix=f"use a floor from 0, whole numbers from 1 (within) and from {FEWEST} (last), and 'direct' or 'total'.",
            )
        self.floor, self.within, self.part = float(floor), within, part
        self.warnings: list[EntropyWarning] = []
        self._seen: deque[tuple[float, float]] = deque(maxlen=last)
        self._on_warning, self._again_after, self._stop = on_warning, again_after, stop

    def begin(self) -> None:
        """A new training, or one that goes on: warnings and forecasts of before are not its own."""
        self.warnings.clear()
        self._seen.clear()

    @property
    def wants_stop(self) -> bool:
        """Whether a warning was given, and is to stop the training."""
        return self._stop and bool(self.warnings)

    def __call__(self, forecast: StepForecast) -> None:
        """Look at one more forecast."""
        result = forecast.result
        if result is None:
            return
        own = result.split.direct if self.part == "direct" and result.split is not None else result.forecast
        if math.isnan(own.value) or math.isnan(own.std_error):
            return
        self._seen.append((own.value, own.std_error))
        silent = self.warnings and forecast.step - self.warnings[-1].step < self._again_after
        found = None if silent else self._warning(forecast, result)
        if found is None:
            return
        self.warnings.append(found)
        if self._on_warning is not None:
            self._on_warning(found)
        elif not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            log.warning("%s", found)

    def _warning(self, forecast: StepForecast, result: DeltaH1Result) -> EntropyWarning | None:
        count = len(self._seen)
        if count < FEWEST:
            return None
        values, errors = (np.array(own) for own in zip(*self._seen, strict=True))
        mean = float(values.mean())
        error = max(float(np.sqrt((errors**2).sum())) / count, float(values.std(ddof=1)) / math.sqrt(count))
        bound = result.entropy_level + self.within * (mean + float(student_t.ppf(SURE, count - 1)) * error)
        if not bound < self.floor:
            return None
        return EntropyWarning(
            forecast.step, result.entropy_level, self.floor, self.within, mean, error, lowering_most(result),
            _tokens(forecast), result.unit,
        )  # fmt: skip


def _tokens(forecast: StepForecast) -> tuple[tuple[str, float], ...]:
    """None where they cannot be worked out: a warning is given all the same."""
    if forecast.tokens is None:
        return ()
    try:
        return forecast.tokens.lowering_most(NAMED)
    except Exception as error:
        log.warning("the tokens that lower entropy most cannot be worked out (%s: %s)", type(error).__name__, error)
        return ()


def lowering_most(result: DeltaH1Result, count: int = NAMED) -> tuple[tuple[str, float], ...]:
    """The prompts whose entropy the step lowers most, with their shares."""
    ranked: Sequence[tuple[float, str]] = sorted(
        (p.delta_h1, repr(p.prompt[:SHOWN]) if p.prompt else f"group {', '.join(map(str, p.group_ids))}")
        for p in result.per_prompt
        if p.role != "update" and p.delta_h1 < 0
    )
    return tuple((name, share) for share, name in ranked[:count])
