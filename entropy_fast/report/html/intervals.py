"""A figure of forecasts as points with their 95 % intervals on one axis, one row each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.report.html.numbers import interval_text, percent, with_error
from entropy_fast.report.html.scales import Axis, axis_over

__all__ = ["IntervalFigure", "IntervalRow", "Named", "interval_figure", "side_of", "sure_side_of"]


@dataclasses.dataclass(frozen=True)
class Named:
    """A forecast with what it is called, and what it is of."""

    label: str
    about: str
    forecast: Forecast


@dataclasses.dataclass(frozen=True)
class IntervalRow:
    """One forecast.

    Attributes:
        label: its name; about: what it is of.
        value: with its standard error; interval: its ends; share: in percent of the level, empty where there is none.
        side: ``lowers`` or ``raises``; ``unsure`` where the sign is not established.
        sure: whether its sign is established; None where that cannot be said.
        place: of the value, in percent of the axis; None where it is not known.
        low: of the interval's ends likewise; high: the other.
    """

    label: str
    about: str
    value: str
    interval: str
    share: str
    side: str
    sure: bool | None
    place: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class IntervalFigure:
    """Rows on a common axis, in ``unit``."""

    rows: tuple[IntervalRow, ...]
    axis: Axis
    unit: str

    @property
    def with_shares(self) -> bool:
        """Whether any row is known in percent."""
        return any(row.share for row in self.rows)


def interval_figure(named: Sequence[Named], unit: str, level: float = math.nan) -> IntervalFigure:
    """Rows for forecasts in one unit.

    Args:
        named: in the order of the rows.
        unit: of all.
        level: what they are taken in percent of; NaN for nothing.
    """
    numbers = [x for one in named for x in (one.forecast.value, *one.forecast.interval())]
    axis = axis_over(numbers)
    return IntervalFigure(tuple(_row(one, axis, level) for one in named), axis, unit)


def _row(named: Named, axis: Axis, level: float) -> IntervalRow:
    forecast = named.forecast
    low, high = forecast.interval()
    return IntervalRow(
        named.label,
        named.about,
        with_error(forecast.value, forecast.std_error),
        interval_text(low, high) if low < high else "",
        percent(forecast.value, level),
        sure_side_of(forecast),
        forecast.established,
        *(None if math.isnan(x) else axis.place(x) for x in (forecast.value, low, high)),
    )


def side_of(value: float) -> str:
    """What a change does to the entropy, in the word that stands for its colour."""
    return "" if math.isnan(value) or value == 0 else "lowers" if value < 0 else "raises"


def sure_side_of(forecast: Forecast) -> str:
    """The same of a forecast whose sign is established, and ``unsure`` of any other."""
    return side_of(forecast.value) if forecast.established else "unsure"
