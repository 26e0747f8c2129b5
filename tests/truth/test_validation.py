"""A forecast held against what was measured: known numbers in, known sentences out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts

from entropy_fast import DeltaH1Result, EstimateOptions, fast_delta_h1
from entropy_fast.errors import ConfigError
from entropy_fast.report.validation import summary, write_validation_picture
from entropy_fast.truth import RealisedChange, RealisedChanges, Symmetric, measure_delta_h, validation_of


@pytest.fixture(scope="module")
def result() -> DeltaH1Result:
    model = models.tiny_transformer().train()
    options = options_of(step="next", entropy_estimator="rao_blackwell")
    return fast_delta_h1(
        model, models.stepped_adam(model), make_rollouts(Shape(budget=2), models.VOCABULARY), **options
    )


def changes(result: DeltaH1Result, curvature: float, *, total: float = 1.0, off: float = 1.0) -> RealisedChanges:
    """As a policy would do whose direct change is ``off`` times the forecast's, with a curvature in units of it."""
    assert result.split is not None
    f, points = off * result.split.on_batch, []
    for eta in (1e-6, 0.01, 0.1, 1.0, 10.0):
        second = curvature * f * eta**2
        value = total * eta * result.split.total.value
        error = 0.5 * eta * abs(result.split.total.value)
        symmetric = Symmetric(eta * f, value, error)
        points.append(
            RealisedChange(
                eta, eta * f + second, value, error, math.nan, symmetric, second, 1.0, 0.1, False, eta < 1e-3
            )
        )
    return RealisedChanges(tuple(points), 1.0, 1e-9, result.learning_rate, result.geometry, 1.0)


def test_what_fits_has_slope_one(result: DeltaH1Result) -> None:
    found = validation_of(result, changes(result, 0.0))
    assert found.slope == pytest.approx(1) and found.smallest_ratio == pytest.approx(1)
    assert found.r_squared == pytest.approx(1) and found.own_ratio == pytest.approx(1)
    assert math.isinf(found.ten_percent_off) and found.total_slope == pytest.approx(1)
    assert result.split is not None
    total = result.split.total
    assert found.total_slope_error == pytest.approx(math.hypot(0.5, total.std_error / total.value))
    assert "nowhere 10 % off" in summary(found)


def test_curvature_is_seen_one_way_and_made_up_for(result: DeltaH1Result) -> None:
    found = validation_of(result, changes(result, 0.2))
    assert found.slope == pytest.approx(1) and found.own_ratio == pytest.approx(1)
    # 2 % off at a tenth of the step and 20 % at all of it: 10 % on a line between, in the logarithm of the rate.
    assert found.ten_percent_off == pytest.approx(result.learning_rate * 10 ** (-1 + 0.08 / 0.18))
    assert found.r_squared < 0.9999


def test_what_does_not_come_true_is_said(result: DeltaH1Result) -> None:
    found = validation_of(result, changes(result, 0.0, off=0.5, total=-1.0))
    assert found.slope == pytest.approx(0.5) and found.smallest_ratio == pytest.approx(0.5)
    assert found.total_slope == pytest.approx(-1) and math.isnan(found.ten_percent_off)
    assert "more than 10 % off from learning rate" in summary(found) and "the smallest tried, on" in summary(found)


def test_below_the_floor_nothing_is_said(result: DeltaH1Result) -> None:
    found = changes(result, 0.0)
    below = tuple(dataclasses.replace(p, below_floor=True) for p in found.points)
    nothing = validation_of(result, dataclasses.replace(found, points=below))
    assert math.isnan(nothing.slope) and math.isnan(nothing.own_ratio) and math.isnan(nothing.r_squared)
    assert "nothing can be said" in summary(nothing)


def test_another_step_is_no_comparison(result: DeltaH1Result) -> None:
    for other in ({"geometry": "adam_static"}, {"learning_rate": 2 * result.learning_rate}):
        with pytest.raises(ConfigError, match="and what was"):
            validation_of(result, dataclasses.replace(changes(result, 0.0), **other))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))])
def test_a_real_policy_does_what_its_forecast_says(seed: int, tmp_path: Path) -> None:
    model = models.tiny_transformer(seed=seed).train()
    optimizer = models.stepped_adam(model, seed)
    rollouts, held_out = (make_rollouts(Shape(budget=2), models.VOCABULARY, s) for s in (seed, 10 + seed))
    estimate = EstimateOptions(step="next", max_grad_norm=0.1)
    result = fast_delta_h1(model, optimizer, rollouts, estimate=estimate)
    etas = (0.001, 0.01, 0.1)
    changes = measure_delta_h(model, optimizer, rollouts, held_out=held_out, etas=etas, estimate=estimate)
    found = validation_of(result, changes)
    assert found.smallest_ratio == pytest.approx(1, abs=1e-5) and found.own_ratio == pytest.approx(1, abs=0.05)
    assert not math.isnan(found.total_slope)
    path = write_validation_picture({"a": found}, tmp_path / "v.png")
    assert path.read_bytes().startswith(b"\x89PNG")
