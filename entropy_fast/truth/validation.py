"""Whether a forecast comes true: what was measured along a step, held against it.

Legend: η multiple of the optimizer's step, f forecast of the direct change of the batch at η = 1, F ± s that of the total, r(η)
what was found. The slope is the mean of r/(ηf), every multiple alike since they span orders of magnitude; R² is that of the
least squares line of r on ηf through the origin, 1 - Σ(r - b ηf)² / Σ r².
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

from entropy_fast.errors import ConfigError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.truth.measuring import RealisedChange, RealisedChanges

__all__ = ["Validation", "validation_of"]

OFF = 0.1  # share by which the first order may be off


@dataclasses.dataclass(frozen=True)
class Validation:
    """Of one checkpoint; numbers that cannot be had are NaN.

    Attributes:
        forecast: f, and of the total F with its standard error for this update.
        points: what was found.
        unit: of all of them.
        level: entropy before the step.
        floor: changes below this are rounding.
        learning_rate: of the step at η = 1.
        geometry: which step.
        slope: mean of (direct change, both ways halved) / (ηf), over multiples above the floor up to 1.
        r_squared: of the line through the direct change one way, over the same multiples.
        smallest_ratio: r/(ηf) at the smallest multiple above the floor, both ways halved.
        own_ratio: (change one way) / (ηf + second order) at η = 1, or the multiple nearest to it.
        total_slope: r/(ηF) of the total at that multiple, both ways halved.
        total_slope_error: of that, from the sampled responses of both sides.
        ten_percent_off: learning rate at which the change one way is 10 % off ηf, between multiples on a line in log η;
            infinite where it never is.
    """

    forecast: tuple[float, float, float]
    points: tuple[RealisedChange, ...]
    unit: str
    level: float
    floor: float
    learning_rate: float
    geometry: str
    slope: float
    r_squared: float
    smallest_ratio: float
    own_ratio: float
    total_slope: float
    total_slope_error: float
    ten_percent_off: float


def validation_of(result: DeltaH1Result, found: RealisedChanges) -> Validation:
    """Hold what was measured against a forecast of the same step.

    Raises:
        ConfigError: the forecast has no direct part, or is of another step.
    """
    if result.split is None:
        raise ConfigError(
            "validation: the forecast has no direct part to be held against a re-scoring.",
            fix="use entropy_estimator='rao_blackwell'.",
        )
    if result.geometry != found.geometry or not math.isclose(result.learning_rate, found.learning_rate):
        raise ConfigError(
            f"validation: the forecast is of {result.geometry} at learning rate {result.learning_rate:g}, and what was "
            f"measured of {found.geometry} at {found.learning_rate:g}.",
            fix="pass the same options to both.",
        )
    direct, total = result.split.on_batch, result.split.total
    seen = sorted((p for p in found.points if not p.below_floor), key=lambda p: p.eta)
    small = [p for p in seen if p.eta <= 1]
    ratios = [p.symmetric.direct / (p.eta * direct) for p in small] if direct else []
    slope = sum(ratios) / len(ratios) if ratios else math.nan
    own = min(found.points, key=lambda p: abs(math.log(p.eta)))
    total_slope = total_error = math.nan
    if not math.isnan(own.total) and total.value:
        total_slope = own.symmetric.total / (own.eta * total.value)
        # Of a ratio, to first order: both sides are samples.
        relative = math.hypot(own.symmetric.total_std_error / own.eta, total_slope * total.std_error)
        total_error = relative / abs(total.value)
    return Validation(
        (direct, total.value, total.std_error),
        found.points,
        result.unit,
        found.level,
        found.floor,
        found.learning_rate,
        found.geometry,
        slope,
        _r_squared([p.eta * direct for p in small], [p.direct for p in small]),
        seen[0].symmetric.direct / (seen[0].eta * direct) if seen and direct else math.nan,
        _ratio(own.direct, own.eta * direct + own.second_order) if not own.below_floor else math.nan,
        total_slope,
        total_error,
        _ten_percent_off(seen, direct) * found.learning_rate,
    )


def _ratio(found: float, forecast: float) -> float:
    return found / forecast if forecast else math.nan


def _r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    squares, products, spread = (
        sum(a * a for a in x),
        sum(a * b for a, b in zip(x, y, strict=True)),
        sum(b * b for b in y),
    )
    if not squares or not spread:
        return math.nan
    slope = products / squares
    return 1 - sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / spread


def _ten_percent_off(points: Sequence[RealisedChange], direct: float) -> float:
    """The multiple at which the change one way is 10 % off; NaN where it is from the first multiple on, or nothing was seen."""
    if not points or not direct:
        return math.nan
    off = [(p.eta, abs(p.direct / (p.eta * direct) - 1)) for p in points]
    if off[0][1] >= OFF:
        return math.nan
    for (low, before), (high, after) in pairwise(off):
        if after >= OFF:
            share = (OFF - before) / (after - before)
            return math.exp(math.log(low) + share * math.log(high / low))
    return math.inf
