"""Where numbers lie on an axis, and how strongly they are coloured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fast.report.html.scales import LEVELS, axis_over, level_of

numbers = st.lists(st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-9), min_size=1, max_size=6)


def read(label: str) -> float:
    return float(label.translate(str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")).replace("×10", "e"))


@given(numbers)
def test_all_numbers_are_on_the_axis_in_their_order_with_room(values):
    axis = axis_over(values)
    for value in (*values, 0.0):
        assert 1 < axis.place(value) < 99
    low, high = min(values), max(values)
    if high - low > 0.1 * (axis.high - axis.low):
        assert axis.place(low) < axis.place(high)
    assert axis.zero == axis.place(0)


@given(numbers)
def test_ticks_stand_at_the_numbers_they_name(values):
    axis = axis_over(values)
    assert 2 <= len(axis.ticks) <= 8
    for tick in axis.ticks:
        assert abs(axis.place(read(tick.label)) - tick.place) < 0.3


def test_numbers_that_are_not_known_are_no_part_of_it():
    assert axis_over([math.nan, 2.0, -1.0, math.inf]) == axis_over([2.0, -1.0])
    assert axis_over([5.0, 6.0], zero=False).low > 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (1, LEVELS),
        (-1, -LEVELS),
        (0.25, LEVELS // 2),
        (-0.25, -LEVELS // 2),
        (2, LEVELS),
        (1e-9, 0),
        (math.nan, 0),
    ],
)
def test_colour_goes_with_the_square_root(value, expected):
    assert level_of(value, 1.0) == expected
    assert level_of(value, 0.0) == 0
