"""Forecasts as points with their 95 % intervals, a row each: parts of δH₁, parts of the step, updates side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from entropy_fast.errors import ConfigError
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.held import part_of, parts_of, step_parts_of, updates_of
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.split import UpdateForecasts
from entropy_fast.estimates.verdict import percent_of, shown_percent
from entropy_fast.report.plots.canvas import (
    PART_COLOURS,
    PART_MARKERS,
    axes_or_new,
    name_axis,
    named_rows,
    numbered_rows,
    text_colour,
    titled,
    zero_line,
)
from entropy_fast.report.plots.decimal_scale import DecimalScale, figures
from entropy_fast.report.text import printable

__all__ = ["draw_parts", "draw_step_parts", "draw_updates"]

ROW = 0.42  # inches
APART = 0.17  # rows between the two points of one row
NAME = 32  # characters
STEP_PARTS = {
    "momentum": "momentum",
    "decay": "weight decay",
    "fresh": "this batch's gradient",
    "scale": "its effect on the scale",
}
Rows = Sequence[tuple[str, Mapping[str, Forecast]]]


def draw_parts(result: DeltaH1Result, ax: Axes | None) -> Axes:
    """The direct part, the visitation part and the total, those that are known."""
    rows = [(name, {name: forecast}) for name, forecast in parts_of(result).items()]
    ax = _draw(rows, result.unit, ax)
    titled(ax, "Change of the entropy by the next update", f"{_level(result)}\n{_intervals(rows)}")
    return ax


def _level(result: DeltaH1Result) -> str:
    """How much entropy there is, and how much of it the forecast is."""
    now, (name, forecast) = result.entropy_level, part_of(result, None)
    change = percent_of(forecast.value, now)
    there = f"{figures(now, signed=False)} {result.unit}"
    if math.isnan(change):
        return f"the entropy now: {there}"
    sign = "+" if change > 0 else ""
    return f"{name}: {sign}{shown_percent(change)} of the {there} there are now".replace("-", "\N{MINUS SIGN}", 1)


def _intervals(rows: Rows) -> str:
    """What bars and points mean."""
    known = [not math.isnan(forecast.std_error) for _, forecasts in rows for forecast in forecasts.values()]
    if not any(known):
        return "no intervals: there are too few prompts"
    where = "" if all(known) else " where they are known"
    return f"lines: 95 % intervals{where}; hollow: sign not established"


def draw_step_parts(result: DeltaH1Result, ax: Axes | None) -> Axes:
    """What each part of the optimizer's step does, and the whole of it at the bottom."""
    parts = step_parts_of(result)
    rows = [(STEP_PARTS[name], _wanted(result, own)) for name, own in parts.items()]
    ax = _draw([*rows, ("whole step", _wanted(result, None))], result.unit, ax)
    ax.axhline(len(rows) - 0.5, color=text_colour(), linewidth=0.6, alpha=0.5)
    titled(ax, "What each part of the optimizer's step does", _intervals(rows))
    return ax


def draw_updates(result: DeltaH1Result, of: str, ax: Axes | None) -> Axes:
    """What the planned update and others do to the entropy, or to another number.

    Raises:
        ConfigError: there is no functional called ``of``.
        ResultError: the result holds no other updates.
    """
    updates = updates_of(result)
    if of != "entropy" and of not in result.functionals:
        known = ["entropy", *result.functionals]
        raise ConfigError(f"updates: of is {of!r}.", fix=f"use one of {', '.join(map(repr, known))}.")
    if of == "entropy":
        rows = [(printable(name, NAME), _wanted(result, own)) for name, own in updates.items()]
        ax = _draw(rows, result.unit, ax)
    else:
        rows = [(printable(name, NAME), {of: own.functionals[of]}) for name, own in updates.items()]
        ax = _draw(rows, "per response", ax, what=f"forecast change of {printable(of, NAME)}")
    titled(ax, "Updates compared", _intervals(rows))
    return ax


def _wanted(result: DeltaH1Result, own: UpdateForecasts | None) -> dict[str, Forecast]:
    """The direct part and the total: the visitation part is what is between them."""
    return {name: part for name, part in parts_of(result, own).items() if name != "visitation"}


def _draw(rows: Rows, unit: str, ax: Axes | None, what: str = "forecast change of the entropy") -> Axes:
    """Points and intervals, with their numbers at the right."""
    points = [(row, name, forecast) for row, (_, own) in enumerate(rows) for name, forecast in own.items()]
    apart = max(len(forecasts) for _, forecasts in rows) > 1
    ax = axes_or_new(ax, 7.6, 1.35 + ROW * len(rows) * (1.3 if apart else 1))
    zero_line(ax)
    scale = DecimalScale.of(end for _, _, forecast in points for end in (*forecast.interval(), forecast.value))
    places, numbers, colours = [], [], []
    for row, name, forecast in points:
        below = list(rows[row][1]).index(name)
        y = row + APART * (2 * below - len(rows[row][1]) + 1)
        _point(ax, forecast, y, name)
        places.append(y)
        numbers.append(f"{name} {_in_figures(forecast, scale)}" if apart else _in_figures(forecast, scale))
        colours.append(_colour(name))
    named_rows(ax, [name for name, _ in rows])
    numbered_rows(ax, places, numbers, colours)
    name_axis(ax, "x", what, unit, scale)
    return ax


def _colour(part: str) -> str:
    return PART_COLOURS.get(part) or text_colour()


def _point(ax: Axes, forecast: Forecast, y: float, part: str) -> None:
    """Filled where its sign is established; without a line where there is no interval."""
    colour, (low, high) = _colour(part), forecast.interval()
    if not math.isnan(low):
        ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt", label="_interval")
    face = colour if forecast.established else ax.get_facecolor()
    ax.plot(
        [forecast.value], [y], PART_MARKERS.get(part, "D"), color=colour, markerfacecolor=face, markeredgewidth=1.5,
        markersize=7, label="_forecast",
    )  # fmt: skip


def _in_figures(forecast: Forecast, scale: DecimalScale) -> str:
    if math.isnan(forecast.std_error):
        return f"{scale.text(forecast.value)}  (no interval)"
    low, high = forecast.interval()
    return f"{scale.text(forecast.value)}  [{scale.text(low)}, {scale.text(high)}]"
