"""Numbers on the page are the numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fast.report.html.numbers import interval_text, percent, plain, short, signed, with_error

DIGITS = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")
finite = st.floats(-1e12, 1e12).filter(lambda x: x == 0 or abs(x) > 1e-12)


def read(text: str) -> float:
    return float(text.translate(DIGITS).replace("×10", "e").replace(",", ""))


@given(finite, st.integers(1, 6))
def test_what_is_shown_is_the_number_to_so_many_digits(value, digits):
    for shown in (plain(value, digits), signed(value, digits)):
        assert math.isclose(read(shown), value, rel_tol=0.51 * 10 ** (1 - digits), abs_tol=0)
        assert "-" not in shown
    assert (signed(value)[0] == "+") == (value > 0)


@given(finite)
def test_short_numbers_are_short_and_true(value):
    assert math.isclose(float(short(value)), value, rel_tol=0.051, abs_tol=0)
    assert len(short(value)) <= 8


@given(st.floats(-1e4, 1e4), st.floats(1e-5, 1e4))
def test_a_value_ends_where_its_error_does(value, error):
    shown, _, after = with_error(value, error).partition(" ± ")
    assert math.isclose(read(after), error, rel_tol=0.051)
    assert abs(read(shown) - value) <= max(0.051 * error, 0.006 * abs(value))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (with_error(-0.010522737, 0.00093), "−0.01052 ± 0.00093"),
        (with_error(-0.0667, 0.0153), "−0.067 ± 0.015"),
        (with_error(0.5, math.nan), "+0.500"),
        (with_error(math.nan, 1.0), "unknown"),
        (with_error(2e-9, 1e-10), "+2.00×10⁻⁹ ± 1.0×10⁻¹⁰"),
        (with_error(0.0, 0.0), "0"),
        (plain(math.inf), "∞"),
        (plain(9.9996), "10.0"),
        (plain(-0.0), "0"),
        (interval_text(-1.0, math.nan), "unknown"),
        (interval_text(-0.0127, 0.0083), "−0.0127 to +0.00830"),
        (percent(-0.0105, 1.38), "−0.76 %"),
        (percent(1.0, 0.0), ""),
        (percent(math.nan, 1.0), ""),
    ],
)
def test_cases(shown, expected):
    assert shown == expected
