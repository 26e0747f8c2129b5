"""Intervals against scipy, plain loops and what can be worked out by hand.

Legend: M units, K_nm = X_n · Y_m, U the estimate, ρ_n rows, w_n how often unit n is in a resample (`estimates.intervals`).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.estimates import intervals, u_estimate
from entropy_fast.estimates.intervals import (
    METHODS,
    Resampled,
    interval,
    largest_share,
    population_rows,
    resampled_rows,
    resampled_units,
    share_by_chance,
    update_rows,
)

BOTH = pytest.mark.parametrize("rows_of", [update_rows, population_rows])


def kernels(units: int, *shape: int, seed: int = 0) -> Tensor:
    """[..., M, M] of skewed X_n and Y_n that go along with one another, with some signal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, units, 5, generator=generator, dtype=torch.float64).exp() - 1
    y = 0.5 * x + torch.randn(*shape, units, 5, generator=generator, dtype=torch.float64)
    return x @ y.transpose(-1, -2)


def u_by_loops(kernel: Tensor, units: list[int]) -> float:
    """U over pairs of places whose units are not the same."""
    found = [float(kernel[n, m]) for n, m in itertools.product(units, repeat=2) if n != m]
    return math.fsum(found) / len(found)


def units_of(counts: Tensor) -> list[int]:
    return torch.repeat_interleave(torch.arange(len(counts)), counts.long()).tolist()


def half_width(found: intervals.Interval) -> Tensor:
    return (found.high - found.low) / 2


@pytest.mark.parametrize("units", [3, 4, 9])
def test_rows_have_the_mean_and_the_standard_error_of_the_estimate(units: int) -> None:
    kernel = kernels(units)
    known = u_estimate(float(kernel.sum()), kernel.diagonal(), kernel.sum(1), kernel.sum(0))
    torch.testing.assert_close(update_rows(kernel), known.as_entropy * units, rtol=1e-12, atol=1e-12)
    for rows, error in (
        (update_rows(kernel), known.se_given_update),
        (population_rows(kernel), known.se_jackknife),
    ):
        assert math.isclose(float(rows.mean()), known.value, rel_tol=1e-10)
        assert error is not None and math.isclose(float(rows.std()) / math.sqrt(units), error, rel_tol=1e-10)


@BOTH
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_normal_and_student_are_scipy_s(rows_of: object, level: float) -> None:
    rows = rows_of(kernels(7))  # type: ignore[operator]
    for method, of in (("normal", scipy.stats.norm()), ("student", scipy.stats.t(6))):
        found = interval(rows, method, level)
        expected = rows.mean() + scipy.stats.sem(rows.numpy()) * torch.tensor(of.interval(level))
        torch.testing.assert_close(torch.stack([found.low, found.high]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_satterthwaite_takes_its_degrees_from_k_statistics(seed: int) -> None:
    rows = update_rows(kernels(11, seed=seed))
    k2, k4 = (scipy.stats.kstat(rows.numpy(), n) for n in (2, 4))
    degrees = min(10.0, 2 * k2**2 / (k4 / 11 + 2 * k2**2 / 10))
    expected = scipy.stats.t(degrees).ppf(0.95) * scipy.stats.sem(rows.numpy())
    assert math.isclose(float(half_width(interval(rows, "satterthwaite", 0.9))), expected, rel_tol=1e-9)


def test_degrees_of_freedom_fall_with_one_large_unit_and_do_not_exceed_those_of_student() -> None:
    one = torch.tensor([1.0] + [0.0] * 19, dtype=torch.float64)
    two = torch.tensor([1.0, -1.0] * 10, dtype=torch.float64)
    student, found = (half_width(interval(torch.stack([one, two]), method)) for method in ("student", "satterthwaite"))
    ratio = scipy.stats.t.ppf(0.975, 2 / (1 + 2 / 19)) / scipy.stats.t.ppf(0.975, 19)  # k₄ = 20 k₂² here
    assert math.isclose(float(found[0] / student[0]), ratio, rel_tol=1e-9)
    assert found[1] == student[1]


@pytest.mark.parametrize("units", [4, 7])
def test_resampled_rows_are_means_of_rows_that_were_drawn(units: int) -> None:
    rows = population_rows(kernels(units))
    found = resampled_rows(rows, 60)
    for counts, value, error in zip(intervals._counts(units, 60), found.values, found.errors, strict=True):
        drawn = rows[units_of(counts)].numpy()
        assert math.isclose(float(value), drawn.mean(), rel_tol=1e-10, abs_tol=1e-12)
        assert math.isclose(float(error), scipy.stats.sem(drawn), rel_tol=1e-8)


@pytest.mark.parametrize("units", [4, 7])
def test_resampled_units_leave_out_pairs_of_a_unit_and_its_copy(units: int) -> None:
    """U* over pairs of different units, and its jackknife without one of the M places at a time."""
    kernel = kernels(units)
    found = resampled_units(kernel, 60)
    for counts, value, error in zip(intervals._counts(units, 60), found.values, found.errors, strict=True):
        drawn = units_of(counts)
        assert math.isclose(float(value), u_by_loops(kernel, drawn), rel_tol=1e-10, abs_tol=1e-12)
        deleted = np.array([u_by_loops(kernel, drawn[:at] + drawn[at + 1 :]) for at in range(units)])
        jackknife = math.sqrt((units - 1) / units * np.square(deleted - deleted.mean()).sum())
        assert math.isclose(float(error), jackknife, rel_tol=1e-8)
    # So what stands on the diagonal is in none of it.
    other = resampled_units(kernel + torch.diag(torch.full((units,), 1e3, dtype=torch.float64)), 60)
    torch.testing.assert_close(other.values, found.values)
    torch.testing.assert_close(other.errors, found.errors)


def test_over_all_resamples_the_mean_is_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs with copies would pull it towards the diagonal, which is not an estimate of anything here."""
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    counts = torch.nn.functional.one_hot(every).sum(1).double()
    counts = counts[(counts > 0).sum(1) >= 3]
    monkeypatch.setattr(intervals, "_counts", lambda units, resamples: counts)
    kernel = kernels(4)
    found = resampled_units(kernel, len(counts))
    assert math.isclose(float(found.values.mean()), float(update_rows(kernel).mean()), rel_tol=1e-12)


def test_resamples_are_draws_with_replacement() -> None:
    units, resamples = 5, 40000
    counts = intervals._counts(units, resamples)
    assert counts.shape == (resamples, units)
    assert bool((counts.sum(1) == units).all()) and bool(((counts > 0).sum(1) >= 3).all())
    every = torch.tensor(list(itertools.product(range(units), repeat=units)))
    known = torch.nn.functional.one_hot(every).sum(1).double()
    known = known[(known > 0).sum(1) >= 3]
    for power in (1, 2, 3):
        off = counts.pow(power).mean(0) - known.pow(power).mean(0)
        assert bool((off.abs() < 6 * known.pow(power).std(0) / math.sqrt(resamples)).all())


def test_nothing_depends_on_the_callers_random_numbers_nor_changes_them() -> None:
    kernel = kernels(6)
    torch.manual_seed(1)
    first, state = resampled_units(kernel, 50), torch.get_rng_state()
    torch.manual_seed(2)
    second = resampled_units(kernel, 50)
    torch.manual_seed(1)
    assert torch.equal(first.values, second.values) and torch.equal(first.errors, second.errors)
    assert torch.equal(torch.get_rng_state(), state)


def close(found: intervals.Interval, low: float, high: float) -> bool:
    """Within what 20,000 resamples leave to chance; what half as many degrees would do is far beyond it."""
    allowed = 0.03 * (high - low)
    return abs(float(found.low) - low) < allowed and abs(float(found.high) - high) < allowed


def test_bca_is_scipy_s_for_rows_and_for_units() -> None:
    kernel = kernels(12, seed=2)
    rows, generator = update_rows(kernel), np.random.default_rng(0)
    known = scipy.stats.bootstrap((rows.numpy(),), np.mean, n_resamples=20000, method="BCa", rng=generator)
    low, high = known.confidence_interval
    found = interval(rows, "bca", 0.95, resampled_rows(rows, 20000))
    assert close(found, low, high)
    symmetric = interval(rows, "student", 0.95)
    assert not close(symmetric, low, high)

    def u(places: np.ndarray, axis: int) -> np.ndarray:
        assert axis == -1
        at = torch.from_numpy(places.astype(np.int64))
        different = (at.unsqueeze(-1) != at.unsqueeze(-2)).double()
        pairs = kernel[at.unsqueeze(-1), at.unsqueeze(-2)] * different
        return (pairs.sum((-1, -2)) / different.sum((-1, -2))).numpy()

    known = scipy.stats.bootstrap((np.arange(12.0),), u, n_resamples=20000, batch=2000, method="BCa", rng=generator)
    low, high = known.confidence_interval
    rows = population_rows(kernel)
    assert close(interval(rows, "bca", 0.95, resampled_units(kernel, 20000)), low, high)


def test_studentised_bootstrap_is_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    rows = np.exp(generator.normal(size=10))
    t = []
    while len(t) < 20000:
        drawn = generator.choice(rows, 10)
        if len(set(drawn)) >= 3:
            t.append((drawn.mean() - rows.mean()) / (drawn.std(ddof=1) / math.sqrt(10)))
    low, high = rows.mean() - np.quantile(t, [0.975, 0.025]) * scipy.stats.sem(rows)
    found = interval(torch.from_numpy(rows), "studentised", 0.95, resampled_rows(torch.from_numpy(rows), 20000))
    assert close(found, low, high)
    # It leans to one side, as rows do.
    assert abs((high + low) / 2 - rows.mean()) > 0.1 * (high - low)


def test_quantiles_of_few_resamples_by_hand() -> None:
    """Nine resamples at 80 %: the first and the ninth, t* from -4 to 4, of rows with a standard error of 1 around 0."""
    rows = torch.tensor([math.sqrt(3), -math.sqrt(3), 0.0, 0.0], dtype=torch.float64) * math.sqrt(2)
    values = torch.arange(-4.0, 5.0, dtype=torch.float64)[torch.randperm(9)]
    known = Resampled(values, torch.full_like(values, 2.0))
    found = interval(rows, "studentised", 0.8, known)
    torch.testing.assert_close(torch.stack([found.low, found.high]), torch.tensor([-2.0, 2.0], dtype=torch.float64))
    found = interval(rows, "bca", 0.8, known)  # neither bias nor skewness
    torch.testing.assert_close(torch.stack([found.low, found.high]), torch.tensor([-4.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize("level", [0.6, 0.95])
def test_bca_by_its_formula(level: float) -> None:
    rows = np.exp(1.5 * np.random.default_rng(2).normal(size=9))
    values = rows.mean() + np.linspace(-2, 3, 499)
    a = scipy.stats.skew(rows) / (6 * math.sqrt(9))
    assert a > 0.03
    z0 = scipy.stats.norm.ppf((values < rows.mean()).mean())
    z = z0 + scipy.stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    expected = np.quantile(values, scipy.stats.norm.cdf(z0 + z / (1 - a * z)), method="weibull")
    given = torch.from_numpy(values[::-1].copy())
    found = interval(torch.from_numpy(rows), "bca", level, Resampled(given, torch.ones_like(given)))
    torch.testing.assert_close(torch.stack([found.low, found.high]), torch.from_numpy(expected), rtol=1e-9, atol=0)


def test_ends_without_bounds_are_infinite_and_not_unknown() -> None:
    rows = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    values = torch.tensor([-1.0] + [0.0] * 7 + [1.0], dtype=torch.float64)
    for errors, level in itertools.product((values.square() * 0 + 1, 1 - values.square()), (0.7, 0.8, 0.9)):
        found = interval(rows, "studentised", level, Resampled(values, errors))
        assert math.isinf(float(found.low)) == math.isinf(float(found.high)) == (float(errors[0]) == 0)
        assert float(found.low) < 0 < float(found.high)


def test_coverage_of_normal_rows_is_what_theory_says() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20000, 6, generator=generator, dtype=torch.float64)
    expected = {"student": 0.95, "normal": 2 * scipy.stats.t(5).cdf(scipy.stats.norm.ppf(0.975)) - 1}
    for method, share in expected.items():
        found = interval(rows, method)  # type: ignore[arg-type]
        covered = float(((found.low <= 0) & (found.high >= 0)).double().mean())
        assert abs(covered - share) < 6 * math.sqrt(share * (1 - share) / len(rows)), method


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_equal_leave_no_width(method: intervals.Method, rows_of: object) -> None:
    kernel = torch.full((5, 5), 0.3, dtype=torch.float64)
    found = interval(rows_of(kernel), method, resampled=resampled_units(kernel, 99))  # type: ignore[operator]
    torch.testing.assert_close(torch.stack([found.low, found.high]), torch.full((2,), 0.3, dtype=torch.float64))


def test_where_one_unit_has_the_whole_update_a_side_has_no_bound() -> None:
    """Many resamples are without it, and say nothing of how large the change may be."""
    kernel = torch.zeros(5, 5, dtype=torch.float64)
    kernel[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    found = interval(population_rows(kernel), "studentised", 0.95, resampled_units(kernel, 999))
    assert float(found.high) == math.inf and math.isfinite(float(found.low))
    assert float(largest_share(population_rows(kernel))) > 0.7


def test_largest_share_by_hand() -> None:
    rows = torch.tensor([[3.0, -1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    found = largest_share(rows)
    torch.testing.assert_close(found[:2], torch.tensor([0.75, 0.25], dtype=torch.float64))
    assert bool(found[2].isnan())


def test_a_share_that_is_large_by_chance() -> None:
    # Two-sided critical values of max |x - mean| / s, from tables.
    for units, chance, known in ((10, 0.05, 2.290), (10, 0.01, 2.482), (20, 0.05, 2.709), (100, 0.05, 3.384)):
        assert math.isclose(share_by_chance(units, chance), known**2 / (units - 1), rel_tol=1e-3)
    assert share_by_chance(100) == share_by_chance(100, 0.01)
    generator = torch.Generator().manual_seed(0)
    shares = largest_share(torch.randn(100000, 12, generator=generator, dtype=torch.float64))
    assert 0.009 < float((shares > share_by_chance(12)).double().mean()) < 0.0115


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_with_too_few_units_nothing_is_known(method: intervals.Method, units: int) -> None:
    found = interval(torch.arange(float(units)), method)
    least = 4 if method in ("studentised", "bca") else 2
    assert bool(found.low.isnan()) == bool(found.high.isnan()) == (units < least)
    kernel = kernels(units)
    assert bool(resampled_units(kernel, 9).values.isnan().all())


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    with pytest.raises(ConfigError, match="level"):
        interval(torch.arange(4.0), "student", level)


def test_a_method_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="use one of normal, student"):
        interval(torch.arange(4.0), "studentized")  # type: ignore[arg-type]


@given(
    shape=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    units=st.integers(2, 9),
    level=st.floats(0.5, 0.999),
    seed=st.integers(0, 1000),
)
def test_leading_dimensions_are_many_calls(shape: tuple[int, ...], units: int, level: float, seed: int) -> None:
    kernel = kernels(units, *shape, seed=seed)
    for rows_of in (update_rows, population_rows) if units > 2 else (update_rows,):
        rows, resampled = rows_of(kernel), resampled_units(kernel, 39)
        assert rows.shape == (*shape, units)
        assert resampled.values.shape == resampled.errors.shape == (*shape, 39)
        assert largest_share(rows).shape == shape
        for method, of in itertools.product(METHODS, (None, resampled)):
            found = interval(rows, method, level, of)
            assert found.low.shape == found.high.shape == shape
            for at in itertools.product(*map(range, shape)):
                own = None if of is None else resampled_units(kernel[at], 39)
                alone = interval(rows_of(kernel[at]), method, level, own)
                for many, one in ((found.low[at], alone.low), (found.high[at], alone.high)):
                    torch.testing.assert_close(many, one, rtol=1e-7, atol=1e-9, equal_nan=True)


@given(
    units=st.integers(4, 12),
    factor=st.sampled_from([-3.0, -1e-6, 1e-6, 1e4]),
    level=st.floats(0.5, 0.999),
    seed=st.integers(0, 1000),
)
def test_intervals_go_along_with_the_unit(units: int, factor: float, level: float, seed: int) -> None:
    kernel = kernels(units, seed=seed)
    for method in METHODS:
        own, other = (
            interval(population_rows(of), method, level, resampled_units(of, 99)) for of in (kernel, factor * kernel)
        )
        low, high = (own.low, own.high) if factor > 0 else (own.high, own.low)
        torch.testing.assert_close(other.low, factor * low, rtol=1e-6, atol=1e-9 * abs(factor))
        torch.testing.assert_close(other.high, factor * high, rtol=1e-6, atol=1e-9 * abs(factor))
