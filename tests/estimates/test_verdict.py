"""One sentence of verdict: what it claims is what the forecasts establish, and its numbers are theirs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.split import Split
from entropy_fast.estimates.verdict import percent_of, shown_percent, verdict_of

UNIT = "nats per token"
UNITS = 8


def forecast(value: float, error: float) -> Forecast:
    return Forecast(value, error, error, UNITS, torch.full((UNITS,), value / UNITS, dtype=torch.float64))


def split(direct: Forecast, total: Forecast) -> Split:
    return Split(total, direct, forecast(total.value - direct.value, 1.0), direct.value)


def verdict(direct: tuple[float, float], total: tuple[float, float], level: float = 0.5):
    parts = split(forecast(*direct), forecast(*total))
    return verdict_of(parts.total, parts, level, UNIT)


def surely(value: float, error: float) -> bool | None:
    """Beyond both two standard errors and the end of Student's interval."""
    if math.isnan(error):
        return None
    return value != 0 and abs(value) >= 2 * error and abs(value) > student_t.ppf(0.975, UNITS - 1) * error


TODAY, ALL = "at the prefixes visited today", "in all"


@pytest.mark.parametrize(
    ("direct", "total", "sentence"),
    [
        (
            (-0.01, 0.001),
            (-0.05, 0.01),
            f"To first order this update lowers the entropy by 2 % {TODAY} and by 10 % {ALL}; both signs are established.",
        ),
        (
            (-0.01, 0.001),
            (0.05, 0.01),
            f"To first order this update lowers the entropy by 2 % {TODAY} and raises it by 10 % {ALL}; both signs are "
            "established.",
        ),
        (
            (0.01, 0.001),
            (-0.05, 0.2),
            f"To first order this update raises the entropy by 2 % {TODAY}, and that sign is established; which way it goes "
            f"{ALL} (-10 %) is not.",
        ),
        (
            (0.01, 0.1),
            (-0.05, 0.01),
            f"To first order this update lowers the entropy by 10 % {ALL}, and that sign is established; which way it goes "
            f"{TODAY} (+2 %) is not.",
        ),
        (
            (0.01, 0.1),
            (-0.05, 0.2),
            f"Which way this update moves the entropy is not established, neither {TODAY} (+2 % to first order) nor {ALL} "
            "(-10 %).",
        ),
        (
            (-0.01, math.nan),
            (0.05, math.nan),
            f"To first order this update lowers the entropy by 2 % {TODAY} and raises it by 10 % {ALL}; there are too few "
            "prompts to say how surely.",
        ),
        (
            (-0.01, 0.001),
            (math.nan, math.nan),
            f"To first order this update lowers the entropy by 2 % {TODAY}; its sign is established.",
        ),
        ((0.0, 0.0), (0.0, 0.0), "To first order this update does not change the entropy: the forecast is exactly 0."),
    ],
)
def test_what_is_said(direct, total, sentence):
    if math.isnan(total[0]):
        part = forecast(*direct)
        found = verdict_of(part, Split(Forecast.unknown(UNITS), part, Forecast.unknown(UNITS), 0.0), 0.5, UNIT)
        assert (found.total_established, math.isnan(found.total_percent)) == (None, True)
    else:
        found = verdict(direct, total)
        assert found.total_percent == pytest.approx(200 * total[0], rel=1e-12)
    assert found.sentence == sentence
    assert found.direct_percent == pytest.approx(200 * direct[0], rel=1e-12)
    assert found.level == 0.5


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (0.001, "To first order this update lowers the entropy by 2 %; its sign is established."),
        (0.1, "Which way this update moves the entropy is not established: -2 % to first order."),
        (
            math.nan,
            "To first order this update lowers the entropy by 2 %; there are too few prompts to say how surely.",
        ),
    ],
)
def test_without_parts_it_is_about_the_whole(error, sentence):
    found = verdict_of(forecast(-0.01, error), None, 0.5, UNIT)
    assert found.sentence == sentence
    assert found.direct_established is None
    assert math.isnan(found.direct_percent)


@pytest.mark.parametrize("level", [0.0, -1.0, 1e-320, math.nan, math.inf])
def test_without_a_level_it_is_in_nats(level):
    found = verdict((-0.01, 0.001), (-0.05, 0.01), level)
    assert math.isnan(found.direct_percent) and math.isnan(found.total_percent)
    assert "by 0.01 nats per token" in found.sentence and "by 0.05 nats per token" in found.sentence
    assert "%" not in found.sentence


numbers = st.floats(-1e3, 1e3).map(lambda x: 0.0 if abs(x) < 1e-9 else x)
errors = st.one_of(st.just(math.nan), st.floats(1e-9, 1e3))


@given(direct=numbers, direct_error=errors, total=numbers, total_error=errors, level=st.floats(1e-3, 1e3))
def test_it_claims_what_is_established_and_nothing_else(direct, direct_error, total, total_error, level):
    if math.isnan(direct_error) or math.isnan(total_error):
        direct_error = total_error = math.nan  # it is the number of prompts that is too small
    found = verdict((direct, direct_error), (total, total_error), level)
    sure = surely(direct, direct_error), surely(total, total_error)
    assert (found.direct_established, found.total_established) == sure
    said = found.sentence
    assert said.endswith(".") and not re.search(r"[.!?]\s", said) and "\n" not in said and said.isprintable()
    assert ("both signs are established" in said) == (sure == (True, True))
    assert ("that sign is established" in said) == (sorted(map(str, sure)) == ["False", "True"])
    if direct == total == 0:
        assert "exactly 0" in said
        return
    assert ("is not established" in said) == (sure == (False, False))
    assert ("too few prompts" in said) == (sure == (None, None))
    for value, established in zip((direct, total), sure, strict=True):
        percent = shown_percent(abs(percent_of(value, level)))
        assert percent in said or value == 0
        if established:
            assert f"{'lowers' if value < 0 else 'raises'} " in said


@given(st.floats(-1e300, 1e300))
def test_a_shown_percent_is_within_its_two_digits(percent):
    text = shown_percent(percent)
    found = float(text.removesuffix(" %"))
    assert found == pytest.approx(percent, rel=0.051, abs=1e-300)
    if 1e-3 <= abs(percent) < 1e6:
        assert "e" not in text
    assert len(text) < 12
