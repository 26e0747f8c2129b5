"""Forecasts of a run and what became of them: over its steps, and one against the other.

The ledger's standard errors have no degrees of freedom: its intervals are ± 1.96 of them, as where it judges coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from entropy_fast.errors import LedgerError
from entropy_fast.report.plots.canvas import (
    LOWERS,
    MUTED,
    RAISES,
    axes_or_new,
    name_axis,
    new_figure,
    text_colour,
    titled,
    zero_line,
)
from entropy_fast.report.plots.decimal_scale import DecimalScale, figures
from entropy_fast.report.text import printable
from entropy_fast.truth import Calibration, EntropyLedger, LedgerEntry

__all__ = ["draw_calibration", "draw_steps", "ledger_page"]

FORECAST, REALISED = RAISES, LOWERS
HALF = 1.96  # of a 95 % interval, in standard errors


def ledger_page(ledger: EntropyLedger, part: str, window: int | None, figure: FigureBase | None) -> FigureBase:
    """Over the steps at the left, one against the other at the right; for the arguments see `draw_calibration`."""
    _of_part(ledger, part)
    figure = new_figure(13.0, 4.4) if figure is None else figure
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
    draw_steps(ledger, part, left)
    draw_calibration(ledger, part, window, right)
    return figure


def draw_steps(ledger: EntropyLedger, part: str, ax: Axes | None) -> Axes:
    """Forecasts with their intervals, and realised changes, by number of the step; what is not known is left out.

    Raises:
        LedgerError: the ledger has no entry of the part.
    """
    entries = sorted(_of_part(ledger, part), key=lambda entry: entry.step)
    ax = axes_or_new(ax, 7.5, 4.2)
    zero_line(ax, "y")
    forecast = [e for e in entries if not math.isnan(e.forecast)]
    known = [e for e in forecast if not math.isnan(e.std_error)]
    for entry in known:
        _interval(ax, (entry.step, entry.forecast), entry.std_error, along="y", width=1.5)
    ax.plot(
        [e.step for e in forecast], [e.forecast for e in forecast], "o", color=FORECAST, markersize=4.5,
        label="forecast, 95 % interval" if known else "forecast",
    )  # fmt: skip
    realised = [e for e in entries if not math.isnan(e.realised)]
    ax.plot(
        [e.step for e in realised], [e.realised for e in realised], "x", color=REALISED, markersize=6, markeredgewidth=1.6,
        label="realised",
    )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best", frameon=False, fontsize="small")
    drawn = [value for e in entries for value in (e.forecast, e.realised)]
    name_axis(ax, "x", "step")
    name_axis(ax, "y", _change(part), _unit(entries), DecimalScale.of(drawn))
    titled(ax, "Forecast and realised")
    return ax


def draw_calibration(ledger: EntropyLedger, part: str, window: int | None, ax: Axes | None) -> Axes:
    """Realised changes against forecasts, the line through the origin that fits them with its 95 % band, and the diagonal.

    Args:
        ledger: forecasts and what became of them.
        part: "total", "direct" or "visitation".
        window: how many of the last pairs; None for all.
        ax: where to.

    Raises:
        LedgerError: the ledger has no entry of the part, or no such window.
    """
    entries = _of_part(ledger, part)
    found = ledger.calibration(part, window)
    pairs = [e for e in entries if not (math.isnan(e.forecast) or math.isnan(e.realised))]
    pairs = pairs if window is None else pairs[-window:]
    ax = axes_or_new(ax, 5.2, 4.6)
    zero_line(ax)
    zero_line(ax, "y")
    for entry in pairs:
        point = (entry.forecast, entry.realised)
        _interval(ax, point, entry.std_error, along="x")
        _interval(ax, point, entry.realised_error, along="y")
    ax.plot([e.forecast for e in pairs], [e.realised for e in pairs], "o", color=FORECAST, markersize=5, label="_pairs")
    ax.axline((0, 0), slope=1, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label="realised = forecast")
    _fitted(ax, found, [e.forecast for e in pairs])
    scale = DecimalScale.of(value for e in pairs for value in (e.forecast, e.realised))
    name_axis(ax, "x", "forecast", _unit(entries), scale)
    name_axis(ax, "y", "realised", _unit(entries), scale)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", frameon=False, fontsize="small")
    of = "" if part == "total" else f" of the {part} part"
    titled(ax, f"Do forecasts{of} come true?", _verdict(found))
    return ax


def _interval(ax: Axes, point: tuple[float, float], error: float, *, along: str, width: float = 1.0) -> None:
    """Around a point; none where the standard error is not known."""
    if math.isnan(error):
        return
    x, y = point
    ends = (
        [[x - HALF * error, x + HALF * error], [y, y]]
        if along == "x"
        else [[x, x], [y - HALF * error, y + HALF * error]]
    )
    ax.plot(*ends, color=FORECAST, linewidth=width, alpha=0.45, label="_interval")


def _fitted(ax: Axes, found: Calibration, forecasts: Sequence[float]) -> None:
    """The line y = slope · x over the forecasts that there are."""
    if math.isnan(found.slope):
        return
    ends = np.array([min(0.0, *forecasts), max(0.0, *forecasts)])
    low, high = found.slope_interval
    label = f"slope {figures(found.slope, signed=False)}"
    if not math.isnan(low):
        ax.fill_between(ends, low * ends, high * ends, color=text_colour(), alpha=0.12, linewidth=0)
        label += f", 95 % interval [{figures(low, signed=False)}, {figures(high, signed=False)}]"
    ax.plot(ends, found.slope * ends, color=text_colour(), linewidth=1.5, label=label)


def _verdict(found: Calibration) -> str:
    """What `Calibration.verdict` says, short enough for a figure."""
    if found.drifts is None:
        return f"{found.n} pairs: too few to judge"
    covered = "" if math.isnan(found.coverage) else f"; {found.coverage:.0%} within their intervals"
    said = f"{found.n} pairs: {'calibration drifts' if found.drifts else 'nothing against the calibration'}{covered}"
    if found.expected_slope < 0.995:
        said += f"\nnoise in the forecasts by itself brings the slope to {figures(found.expected_slope, signed=False)}"
    return said


def _of_part(ledger: EntropyLedger, part: str) -> list[LedgerEntry]:
    entries = [entry for entry in ledger.rows() if entry.part == part]
    if not entries:
        there = sorted({entry.part for entry in ledger.rows()})
        raise LedgerError(
            f"the ledger has no entry of the part {part!r}.",
            fix=f"use one of {', '.join(map(repr, there))}." if there else "record forecasts first.",
        )
    return entries


def _change(part: str) -> str:
    return "change of the entropy" if part == "total" else f"change of the entropy, {part} part"


def _unit(entries: Sequence[LedgerEntry]) -> str:
    return printable(entries[0].unit, 60)
