"""Numbers are read in one power of ten, and none of them as 0 that is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from entropy_fast.report.plots.decimal_scale import DecimalScale, figures

FINITE = st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-30)


def read(shown: str, scale: DecimalScale) -> float:
    return float(shown.replace("−", "-")) * 10.0**scale.exponent


@given(st.lists(FINITE, min_size=1))
def test_what_is_written_is_the_number(values):
    scale, largest = DecimalScale.of(values), max(map(abs, values))
    for value in values:
        found = read(scale.text(value), scale)
        assert math.isclose(found, value, rel_tol=0.5) or abs(found - value) <= 0.0051 * largest
        assert (found == 0) == (value == 0)
    top = max(values, key=abs)
    assert math.isclose(read(scale.text(top), scale), top, rel_tol=0.0051)


@pytest.mark.parametrize(
    ("values", "unit", "shown"),
    [
        ([4.23e-4, -1e-5], "10⁻⁴ nats", ["+4.23", "−0.10"]),
        ([-0.0671, 0.0302], "nats", ["−0.0671", "+0.0302"]),
        ([0.0], "nats", ["0"]),
        ([123.4, math.nan, math.inf], "nats", ["+123"]),
        ([5e-4, -3e-11], "10⁻⁴ nats", ["+5.00", "−3e−07"]),
        ([2.5e7], "10⁷ nats", ["+2.50"]),
    ],
)
def test_examples(values, unit, shown):
    scale = DecimalScale.of(values)
    assert scale.unit("nats") == unit
    assert [scale.text(value) for value in values if math.isfinite(value)] == shown


def test_ticks_are_written_in_it_and_stay_where_they_are():
    ax = Figure().add_subplot()
    ax.set_xlim(-3e-5, 3e-5)
    ax.set_xticks([-3e-5, 0, 3e-5])
    DecimalScale.of([3e-5]).write(ax.xaxis)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["−3", "0", "3"]
    assert ax.get_xticks().tolist() == [-3e-5, 0, 3e-5]
    assert figures(-0.00012345) == "−0.000123" and figures(3.2, signed=False) == "3.2"
