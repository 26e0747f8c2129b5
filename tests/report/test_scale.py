"""Intervals drawn in characters: what is seen is what the numbers say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fast.report.glyphs import ASCII, UNICODE
from entropy_fast.report.scale import Scale

number = st.floats(allow_nan=False, allow_infinity=False)
triple = st.lists(number, min_size=3, max_size=3).map(sorted)


@given(st.lists(triple, min_size=1, max_size=4), st.integers(3, 80), st.sampled_from([UNICODE, ASCII]))
def test_rows_are_as_wide_as_the_scale_and_cross_0_where_the_interval_does(triples, cells, glyphs):
    scale = Scale.of([end for one in triples for end in one], cells)
    header = scale.header()
    assert len(header) == cells and header[scale.zero] == "0"
    for low, value, high in triples:
        row = scale.row(value, (low, high), glyphs)
        assert len(row) == cells
        assert row.count(glyphs.point) == 1
        point = row.index(glyphs.point)
        assert (point < scale.zero) == (value < 0) and (point > scale.zero) == (value > 0)
        drawn = [place for place, character in enumerate(row) if character not in (" ", glyphs.zero)]
        assert drawn == list(range(drawn[0], drawn[-1] + 1)) or scale.zero not in range(drawn[0], drawn[-1] + 1)
        assert (drawn[0] <= scale.zero <= drawn[-1]) == (low <= 0 <= high)
        if row[scale.zero] == glyphs.zero:
            assert not low <= 0 <= high


@given(triple, st.integers(10, 80))
def test_cells_are_in_the_order_of_the_numbers_and_off_by_at_most_one(numbers, cells):
    scale = Scale.of(numbers, cells)
    places = [scale.cell(n) for n in numbers]
    assert places == sorted(places)
    span = scale.high / 2 - scale.low / 2
    if span > 1e-300:
        for n, place in zip(numbers, places, strict=True):
            exact = (n / 2 - scale.low / 2) / span * (cells - 1)
            # Half a cell of rounding, one to keep the signs apart, one that 0 itself is moved by.
            assert abs(place - exact) <= 2.5 + 1e-6


@pytest.mark.parametrize(
    ("interval", "value", "unicode", "plain"),
    [
        ((-8, -4), -6, "  ├─●─┤   ┊", "  |-o-|   :"),
        ((-10, 0), -5, "├────●────┤", "|----o----|"),
        ((-0.1, -0.05), -0.07, "         ●┊", "         o:"),
        ((math.nan, math.nan), -5, "     ●    ┊", "     o    :"),
        ((0, 0), 0, "          ●", "          o"),
    ],
)
def test_what_it_looks_like(interval, value, unicode, plain):
    scale = Scale(-10, 0, 11)
    assert scale.row(value, interval, UNICODE) == unicode
    assert scale.row(value, interval, ASCII) == plain


def test_the_header_names_the_ends_where_there_is_room():
    assert Scale(-0.12, 0.05, 30).header() == "-0.12               0    +0.05"
    assert Scale(-0.12, 0.001, 30).header().rstrip() == "-0.12                       0"
    assert Scale(0, 0, 9).header() == "    0    "
    assert Scale(-1e-7, 1, 5).header() == " 0 +1"
    assert Scale(-1.2e-7, 1.2e7, 5).header().strip() == "0"


def test_nothing_is_drawn_of_what_is_not_known():
    assert Scale.of([math.nan], 7).row(math.nan, (math.nan, math.nan), UNICODE) == "   ┊   "
