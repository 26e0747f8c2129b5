"""The ledger's statistics against computations written another way, and what it says of streams that are right and wrong.

Legend: x forecasts, σ their standard errors, y realised changes, τ their standard errors, b the slope of y on x through 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from entropy_fast.truth import Calibration, EntropyLedger

NAN = math.nan


def ledger_of(entries: Sequence[Sequence[float]], part: str = "total") -> EntropyLedger:
    ledger = EntropyLedger()
    for step, (x, sigma, y, tau) in enumerate(entries):
        ledger.record(step, part=part, forecast=x, std_error=sigma, realised=y, realised_error=tau)
    return ledger


def wilson(k: int, n: int) -> list[float]:
    """Shares at which k of n are 1.96 of that share's own standard deviations off, found by bisection."""
    z = stats.norm.ppf(0.975)

    def off(p: float) -> float:
        return (k - n * p) ** 2 - z**2 * n * p * (1 - p)

    # Where none or all are, the share itself is the other root.
    low = 0.0 if k == 0 else optimize.brentq(off, 1e-15, k / n - 1e-9, xtol=1e-15)
    high = 1.0 if k == n else optimize.brentq(off, k / n + 1e-9, 1 - 1e-15, xtol=1e-15)
    return [float(low), float(high)]


def refitted(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope by least squares, and the root of the sum of squares of its changes when one entry is left out."""

    def fit(kept: list[int]) -> float:
        solution = np.linalg.lstsq(np.array([[x[i]] for i in kept]), np.array([y[i] for i in kept]), rcond=None)
        return float(solution[0][0])

    everything = list(range(len(x)))
    slope = fit(everything)
    return slope, math.sqrt(sum((fit(everything[:i] + everything[i + 1 :]) - slope) ** 2 for i in everything))


numbers = st.floats(-5, 5).map(lambda value: round(value, 3))
maybe = st.one_of(numbers.map(abs), st.just(NAN))
entry = st.tuples(st.one_of(numbers, st.just(NAN)), maybe, numbers, maybe)
unrealised = st.tuples(numbers, maybe, st.just(NAN), st.just(NAN))


@given(entries=st.lists(st.one_of(entry, entry, entry, unrealised), max_size=25), window=st.integers(1, 30) | st.none())
def test_statistics_against_computations_written_another_way(
    entries: list[tuple[float, float, float, float]], window: int | None
) -> None:
    found = ledger_of(entries, "direct").calibration("direct", window)
    seen: list[tuple[float, float, float, float]] = []  # from the last entry back, until the window is full
    n_pairs = sum(not math.isnan(x + y) for x, _, y, _ in entries)
    for x, sigma, y, tau in reversed(entries):
        if window is not None and n_pairs > window and sum(not math.isnan(e[0] + e[2]) for e in seen) == window:
            break
        seen.append((x, sigma, y, 0.0 if math.isnan(tau) else tau))
    pairs = [e for e in reversed(seen) if not math.isnan(e[0] + e[2])]
    unknown = len(seen) - len(pairs)
    xs, ys = [p[0] for p in pairs], [p[2] for p in pairs]
    assert (found.part, found.n, found.unknown) == ("direct", len(pairs), unknown)

    def expect(value: float, expected: float) -> None:
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)

    n_moving = sum(x != 0 for x in xs)
    expect(found.slope, np.linalg.lstsq(np.array(xs)[:, None], np.array(ys), rcond=None)[0][0] if n_moving else NAN)
    if n_moving < 2:
        assert math.isnan(found.slope_error)
    elif 1 - max(x * x for x in xs) / sum(x * x for x in xs) > 1e-4:  # else rounding decides
        slope, error = refitted(xs, ys)
        expect(found.slope_error, error)
        expect(found.slope_interval[1], slope + error * stats.t(len(xs) - 1).ppf(0.975))
        expect(found.slope_interval[0], slope - error * stats.t(len(xs) - 1).ppf(0.975))
    spread = len(xs) >= 3 and len(set(xs)) > 1 and len(set(ys)) > 1
    expect(found.correlation, stats.pearsonr(xs, ys).statistic if spread else NAN)
    misses = [y - x for x, y in zip(xs, ys, strict=True)]
    expect(found.bias, math.fsum(misses) / len(misses) if misses else NAN)
    expect(found.bias_error, float(stats.sem(misses)) if len(misses) > 1 else NAN)
    judged = [p for p in pairs if not math.isnan(p[1])]
    k = sum(abs(y - x) <= 1.96 * math.hypot(sigma, tau) for x, sigma, y, tau in judged)
    assert found.without_error == len(pairs) - len(judged)
    expect(found.coverage, k / len(judged) if judged else NAN)
    for value, expected in zip(found.coverage_interval, wilson(k, len(judged)) if judged else (NAN, NAN), strict=True):
        expect(value, expected)
    squares = sum(x * x for x, *_ in judged)
    expect(found.expected_slope, max(0.0, 1 - sum(p[1] ** 2 for p in judged) / squares) if squares else NAN)
    assert found.drifts is None if len(pairs) < 8 else found.drifts in (True, False)


def stream(
    n: int, seed: int, *, slope: float = 1.0, bias: float = 0.0, claimed: float = 1.0, noise: float = 0.3
) -> list[list[float]]:
    """Forecasts that are the change and noise; ``claimed`` is the size of their errors over that of their noise."""
    generator = np.random.default_rng(seed)
    sigma, tau = noise * generator.uniform(0.5, 1.5, n), 0.1 * generator.uniform(0.5, 1.5, n)
    change = generator.normal(-0.3, 1, n)
    x = change + sigma * generator.normal(size=n)
    y = slope * change + bias + tau * generator.normal(size=n)
    return np.stack([x, claimed * sigma, y, claimed * tau], 1).tolist()  # type: ignore[no-any-return]


def judged(entries: Sequence[Sequence[float]]) -> Calibration:
    return ledger_of(entries).calibration(window=None)


def test_a_calibrated_stream_is_not_said_to_drift() -> None:
    for noise in (0.05, 0.3, 1.0):
        found = judged(stream(2000, 1, noise=noise))
        assert found.drifts is False, found.verdict
        assert found.verdict.startswith("Nothing against the calibration over 2000 steps (total): slope ")
    # Noise pulls the slope: held against 1 alone, it would be said to drift.
    assert found.slope_interval[1] < 0.6
    assert found.expected_slope == pytest.approx(1 / (1 + 1 / 1.09), abs=0.1)
    assert found.coverage == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("n", [20, 50])
def test_how_often_a_calibrated_window_is_said_to_drift(n: int) -> None:
    drifting = [judged(stream(n, seed)).drifts for seed in range(300)]
    assert 0.03 < np.mean([bool(d) for d in drifting]) < 0.22


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"slope": 0.5}, "realised changes are 0.4.* times their forecasts"),
        ({"slope": 2.0}, "realised changes are 1.[6-9].* times their forecasts"),
        ({"bias": 0.2}, "realised changes lie 0.* above their forecasts on average"),
        ({"bias": -0.2}, "realised changes lie 0.* below their forecasts on average"),
        ({"claimed": 0.5}, "the errors are too small"),
        ({"claimed": 2.0}, "the errors are too large"),
    ],
)
def test_a_stream_that_is_off_drifts_and_the_verdict_says_how(wrong: dict[str, float], said: str) -> None:
    for seed in range(5):
        found = judged(stream(500, seed, **wrong))
        assert found.drifts is True
        assert found.verdict.startswith("Calibration drifts over 500 steps (total): ")
        assert re.search(said, found.verdict), found.verdict


def test_what_is_wrong_only_in_the_window_shows_in_the_window() -> None:
    ledger = ledger_of(stream(400, 0) + stream(100, 1, slope=0.0))
    assert ledger.calibration(window=100).drifts is True
    assert ledger.calibration(window=100).n == 100
    assert ledger.calibration().n == 50
    assert "times their forecasts" in ledger.calibration(window=100).verdict
    assert "times their forecasts" not in judged(stream(400, 0)).verdict


def test_seven_pairs_are_too_few_and_eight_are_not() -> None:
    entries = [[1.0 + i, NAN, 3.0 + i * i, NAN] for i in range(8)]
    few, enough = judged(entries[:7]), judged(entries)
    assert (few.drifts, few.complaints) == (None, ())
    assert few.verdict == "Too few to judge: 7 of at least 8 forecasts with a realised change (total)."
    assert enough.drifts is True
    assert "above their forecasts" in enough.verdict
    assert enough.verdict.endswith("; coverage is not judged, with 0 standard errors.")


# Forecasts, and misses that cancel in slope and bias.
BALANCED = [(1.0, 1e-3), (1.0, -1e-3), (-1.0, 1e-3), (-1.0, -1e-3)]


def test_coverage_is_judged_by_its_own_number_of_entries() -> None:
    # Slope and bias are as they should be, and the errors of the first eight far too small.
    entries = [[x, 1e-6 if i < 8 else NAN, x + miss, NAN] for i, (x, miss) in enumerate(BALANCED * 3)]
    assert "too small" in judged(entries).verdict
    entries[0][1] = NAN
    found = judged(entries)
    assert found.without_error == 5
    assert found.drifts is False
    assert found.verdict.endswith("coverage is not judged, with 7 standard errors.")


def test_forecasts_of_nothing_have_no_slope() -> None:
    found = judged([[0.0, 1.0, 0.1 * (-1) ** i, NAN] for i in range(20)])
    assert math.isnan(found.slope)
    assert found.drifts is False
    assert "slope unknown" in found.verdict
