"""Where numbers lie on an axis, and which step of a diverging scale of colours they have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from entropy_fast.report.html.numbers import plain

__all__ = ["LEVELS", "Axis", "Tick", "axis_over", "level_of"]

LEVELS = 8  # of colour on either side of nothing
MARGIN = 0.05  # of the width, on either side of the outermost numbers
STEPS = (1, 2, 2.5, 5, 10)


@dataclasses.dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent of its length, and its label."""

    place: float
    label: str


@dataclasses.dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low: number at its beginning.
        high: number at its end.
        ticks: at round numbers.
    """

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def place(self, value: float) -> float:
        """In percent of the length, of two decimals; numbers beyond an end lie on it."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)

    @property
    def zero(self) -> float:
        """Where 0 is."""
        return self.place(0.0)


def axis_over(values: Sequence[float], *, ticks: int = 4, zero: bool = True) -> Axis:
    """An axis over all numbers that are finite, with room on both sides.

    Args:
        values: at least one of them is finite, unless ``zero``.
        ticks: about how many.
        zero: whether 0 is on it.
    """
    known = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = min(known), max(known)
    if high == low:
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    room = MARGIN * (high - low)
    low, high = low - room, high + room
    step = _round_step((high - low) / ticks)
    numbers = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    axis = Axis(low, high, ())
    return dataclasses.replace(axis, ticks=tuple(Tick(axis.place(x), _label(x, step)) for x in numbers))


def level_of(value: float, largest: float) -> int:
    """A step of the colour scale from -LEVELS to LEVELS, by the square root of the share of the largest size.

    What is small beside a few large numbers stays visible so: half of the colour is a quarter of the number.
    """
    if not largest > 0 or not math.isfinite(value):
        return 0
    return round(math.copysign(LEVELS * math.sqrt(min(1.0, abs(value) / largest)), value))


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in STEPS if step * power >= rough * 0.999)


def _label(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(step)) + 1
    halves = step / 10 ** math.floor(math.log10(step)) == 2.5
    return plain(value, max(1, digits + halves))
