"""A ledger's figures are its numbers: pairs, intervals, the line that fits them; what is not known is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from artists import lines, texts

from entropy_fast.errors import LedgerError
from entropy_fast.truth import EntropyLedger

NAN = math.nan


@pytest.fixture
def ledger() -> EntropyLedger:
    found = EntropyLedger()
    generator = np.random.default_rng(0)
    for step in range(12):
        known = step < 10
        found.record(
            5 * step,
            forecast=float(x := generator.normal()),
            std_error=0.1 if step % 2 else NAN,
            realised=float(0.8 * x + 0.05 * generator.normal()) if known else NAN,
            realised_error=0.02 if known and step % 3 == 0 else NAN,
            unit="nats per token",
        )
    found.record(3, part="direct", forecast=NAN, unit="nats per token", realised=0.5)
    return found


def test_over_the_steps(ledger):
    ax = ledger.plot.steps()
    entries = [entry for entry in ledger.rows() if entry.part == "total"]
    assert lines(ax, "forecast, 95 % interval") == [([e.step for e in entries], [e.forecast for e in entries])]
    assert lines(ax, "realised") == [([e.step for e in entries[:10]], [e.realised for e in entries[:10]])]
    expected = [([e.step] * 2, [e.forecast - 0.196, e.forecast + 0.196]) for e in entries if e.step % 2]
    for (x, y), (steps, ends) in zip(lines(ax, "_interval"), expected, strict=True):
        assert x == steps and y == pytest.approx(ends)
    assert "nats per token" in ax.get_ylabel() and ax.get_xlabel() == "step"


@pytest.mark.parametrize("window", [50, 4, None])
def test_one_against_the_other_with_the_calibration_line(ledger, window):
    ax = ledger.plot.calibration(window=window)
    found = ledger.calibration("total", window)
    pairs = [e for e in ledger.rows() if e.part == "total" and not math.isnan(e.realised)][-(window or 50) :]
    assert len(pairs) == found.n
    assert lines(ax, "_pairs") == [([e.forecast for e in pairs], [e.realised for e in pairs])]
    [(x, y)] = [data for line in ax.lines for data in lines(ax, line.get_label()) if "slope" in str(line.get_label())]
    assert min(x) == min(0, *(e.forecast for e in pairs)) and max(x) == max(0, *(e.forecast for e in pairs))
    assert y == pytest.approx([found.slope * end for end in x])
    [band] = ax.collections
    vertices = band.get_paths()[0].vertices
    slopes = vertices[:, 1][vertices[:, 0] != 0] / vertices[:, 0][vertices[:, 0] != 0]
    assert (slopes.min(), slopes.max()) == pytest.approx(found.slope_interval)
    errors = sum(not math.isnan(e.std_error) for e in pairs) + sum(not math.isnan(e.realised_error) for e in pairs)
    assert len(lines(ax, "_interval")) == errors
    assert f"{found.n} pairs" in texts(ax.figure)


def test_nothing_to_fit_is_no_line(ledger):
    ax = ledger.plot.calibration("direct")
    assert lines(ax, "_pairs") == [([], [])]
    assert not any("slope" in str(line.get_label()) for line in ax.lines)
    assert "0 pairs: too few to judge" in texts(ax.figure)
    steps = ledger.plot.steps("direct")
    assert lines(steps, "forecast") == [([], [])] and lines(steps, "realised") == [([3], [0.5])]


def test_both_on_one_page(ledger):
    figure = ledger.plot()
    left, right = figure.axes
    assert lines(left, "realised") and lines(right, "_pairs")


def test_what_is_not_there_is_an_error(ledger):
    with pytest.raises(LedgerError, match=r"'visitation'.*\n.*'direct', 'total'"):
        ledger.plot("visitation")
    with pytest.raises(LedgerError, match="record forecasts first"):
        EntropyLedger().plot.steps()
    with pytest.raises(LedgerError, match="window 0"):
        ledger.plot.calibration(window=0)
