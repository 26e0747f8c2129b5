"""Forecast and realised changes lie where they are, and so does the calibration line."""

from __future__ import annotations

import math
import re

import pytest

from entropy_fast.report.html.series import MOST_DOTS, Z95, scatter_figure, steps_figure
from entropy_fast.truth import EntropyLedger


def ledger(steps: int = 12, **changes) -> EntropyLedger:
    found = EntropyLedger()
    for step in range(steps):
        entry = {"forecast": -0.1 - 0.01 * step, "std_error": 0.005, "realised": -0.09 - 0.01 * step, **changes}
        found.record(step, part="direct", **entry)
    return found


def test_dots_and_lines_over_steps():
    book = ledger(realised_error=0.002)
    figure = steps_figure(book.rows(), "title")
    assert len(figure.dots) == 12
    for entry, dot in zip(book.rows(), figure.dots, strict=True):
        assert dot.x == figure.x.place(entry.step)
        assert dot.y == pytest.approx(100 - figure.y.place(entry.realised), abs=0.011)
        assert dot.low == pytest.approx(100 - figure.y.place(entry.realised - Z95 * 0.002), abs=0.011)
        assert dot.low > dot.y > dot.high  # downward, as screens count
        assert f"step {entry.step}: forecast" in dot.text
    points = re.findall(r"[ML]([\d.]+) ([\d.]+)", figure.line)
    for entry, (x, y) in zip(book.rows(), points, strict=True):
        assert float(x) == pytest.approx(10 * figure.x.place(entry.step), abs=0.11)
        assert float(y) == pytest.approx(1000 - 10 * figure.y.place(entry.forecast), abs=0.11)
    assert len(re.findall("[ML]", figure.band)) == 24 and figure.band.endswith("Z")
    assert all("." not in tick.label for tick in figure.x.ticks)


def test_what_is_not_known_is_not_drawn():
    figure = steps_figure(ledger(std_error=math.nan, realised=math.nan).rows(), "title")
    assert figure.dots == ()
    assert "nan" not in figure.band + figure.line
    assert steps_figure(ledger(1).rows(), "title") is None
    book = ledger(realised=math.nan)
    assert scatter_figure(book.rows(), book.calibration("direct"), "title") is None


def test_realised_against_forecast():
    book = ledger()
    found = book.calibration("direct")
    figure = scatter_figure(book.rows(), found, "title")
    for entry, dot in zip(book.rows(), figure.dots, strict=True):
        assert dot.x == figure.axis.place(entry.forecast)
        assert dot.y == pytest.approx(100 - figure.axis.place(entry.realised), abs=0.011)
        assert dot.left < dot.x < dot.right and dot.low is None
    x1, y1, x2, y2 = figure.fit
    width = figure.axis.high - figure.axis.low
    assert (y1 - y2) / (x2 - x1) == pytest.approx(found.slope, rel=1e-2)
    through = figure.axis.low + width * x1 / 100, figure.axis.low + width * (100 - y1) / 100
    assert through[1] == pytest.approx(found.slope * through[0], abs=1e-3 * width)


@pytest.mark.parametrize("slope", [-2.0, -0.5, 0.0, 0.5, 3.0])
def test_the_line_stays_within_the_figure(slope):
    book = EntropyLedger()
    for step, x in enumerate((-1.0, 0.5, 2.0)):
        book.record(step, part="direct", forecast=x, realised=slope * x)
    figure = scatter_figure(book.rows(), book.calibration("direct"), "title")
    x1, y1, x2, y2 = figure.fit
    assert all(0 <= place <= 100 for place in figure.fit)
    if slope:
        assert (y1 - y2) / (x2 - x1) == pytest.approx(slope, rel=2e-2)


def test_long_runs_have_so_many_dots():
    book = ledger(0)
    entries = ledger(3).rows() * 1000
    figure = steps_figure(entries, "title")
    assert len(figure.dots) == -(-3000 // figure.every) <= MOST_DOTS
    figure = scatter_figure(entries, book.calibration("direct"), "title")
    assert figure.fit is None and len(figure.dots) <= MOST_DOTS
