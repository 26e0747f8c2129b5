"""Figures of forecasts and what became of them: over the steps of a run, and one against the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from entropy_fast.report.html.numbers import with_error
from entropy_fast.report.html.scales import Axis, axis_over
from entropy_fast.truth import Calibration, LedgerEntry

__all__ = ["Dot", "ScatterFigure", "StepsFigure", "scatter_figure", "steps_figure"]

Z95 = 1.96  # of a ledger's errors nobody knows the degrees of freedom
BOX = 1000  # width and height of the inner coordinates of lines
MOST_DOTS = 400  # of longer runs some steps are not drawn


@dataclasses.dataclass(frozen=True)
class Dot:
    """A number with its interval: places in percent, from the left and from the top; None for ends that are not known."""

    x: float
    y: float
    low: float | None
    high: float | None
    left: float | None
    right: float | None
    text: str


@dataclasses.dataclass(frozen=True)
class StepsFigure:
    """Forecast and realised changes over steps.

    Attributes:
        x: axis of the steps; y: of changes.
        band: intervals of the forecasts as a closed path in a box of 1000 × 1000; line: forecasts as one.
        dots: realised changes.
        title: what it is.
        every: one dot in so many steps.
    """

    x: Axis
    y: Axis
    band: str
    line: str
    dots: tuple[Dot, ...]
    title: str
    every: int


@dataclasses.dataclass(frozen=True)
class ScatterFigure:
    """Realised changes against their forecasts.

    Attributes:
        axis: of both.
        dots: one a step.
        fit: both ends of the calibration line through the origin, in percent from the left and the top; None without one.
        title: what it is.
        every: one dot in so many steps.
    """

    axis: Axis
    dots: tuple[Dot, ...]
    fit: tuple[float, float, float, float] | None
    title: str
    every: int


def steps_figure(entries: Sequence[LedgerEntry], title: str) -> StepsFigure | None:
    """Of one part of a run; None where fewer than two forecasts are known."""
    known = [entry for entry in entries if not math.isnan(entry.forecast)]
    if len(known) < 2:
        return None
    x = axis_over([float(e.step) for e in known], ticks=6, zero=False)
    x = dataclasses.replace(x, ticks=tuple(tick for tick in x.ticks if "." not in tick.label))
    numbers = [e.forecast + sign * _reach(e.std_error) for e in known for sign in (-1, 1)]
    numbers += [e.realised + sign * _reach(e.realised_error) for e in entries for sign in (-1, 1)]
    y = axis_over(numbers, ticks=5)
    upper = [(e.step, e.forecast + _reach(e.std_error)) for e in known]
    lower = [(e.step, e.forecast - _reach(e.std_error)) for e in known]
    seen = [e for e in known if not math.isnan(e.realised)]
    every = max(1, -(-len(seen) // MOST_DOTS))
    dots = tuple(_dot(e, x.place(e.step), y) for e in seen[::every])
    line = [(e.step, e.forecast) for e in known]
    return StepsFigure(x, y, _path(upper + lower[::-1], x, y) + "Z", _path(line, x, y), dots, title, every)


def scatter_figure(entries: Sequence[LedgerEntry], found: Calibration, title: str) -> ScatterFigure | None:
    """Of one part of a run; None where nothing was both forecast and realised."""
    pairs = [e for e in entries if not (math.isnan(e.forecast) or math.isnan(e.realised))]
    if not pairs:
        return None
    numbers = [e.realised + sign * _reach(e.realised_error) for e in pairs for sign in (-1, 1)]
    numbers += [e.forecast + sign * _reach(e.std_error) for e in pairs for sign in (-1, 1)]
    axis = axis_over(numbers, ticks=4)
    dots = []
    every = max(1, -(-len(pairs) // MOST_DOTS))
    for entry in pairs[::every]:
        reach = _reach(entry.std_error)
        left, right = (
            (axis.place(entry.forecast - reach), axis.place(entry.forecast + reach)) if reach else (None, None)
        )
        dots.append(dataclasses.replace(_dot(entry, axis.place(entry.forecast), axis), left=left, right=right))
    return ScatterFigure(axis, tuple(dots), _fit(found.slope, axis), title, every)


def _dot(entry: LedgerEntry, x: float, y: Axis) -> Dot:
    reach = _reach(entry.realised_error)
    low, high = (_down(entry.realised - reach, y), _down(entry.realised + reach, y)) if reach else (None, None)
    text = (
        f"step {entry.step}: forecast {with_error(entry.forecast, entry.std_error)}, realised "
        f"{with_error(entry.realised, entry.realised_error)}"
    )
    return Dot(x, _down(entry.realised, y), low, high, None, None, text)


def _reach(error: float) -> float:
    return 0.0 if math.isnan(error) else Z95 * error


def _down(value: float, axis: Axis) -> float:
    """From the top, as screens count."""
    return round(100 - axis.place(value), 2)


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    found = [f"{x.place(a) * BOX / 100:.1f} {_down(b, y) * BOX / 100:.1f}" for a, b in points]
    return "M" + "L".join(found)


def _fit(slope: float, axis: Axis) -> tuple[float, float, float, float] | None:
    """The line y = slope · x where it lies within both axes."""
    if math.isnan(slope):
        return None
    low, high = axis.low, axis.high
    if slope > 0:
        low, high = max(low, low / slope), min(high, high / slope)
    elif slope < 0:
        low, high = max(low, high / slope), min(high, low / slope)
    return axis.place(low), _down(slope * low, axis), axis.place(high), _down(slope * high, axis)
