"""What a training loop may rely on: nothing breaks it, nothing is 0 that is not known, and seconds are counted."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts

from entropy_fast import EstimateOptions
from entropy_fast.errors import ConfigError, EntropyFastWarning
from entropy_fast.integrations.forecaster import StepForecaster
from entropy_fast.integrations.step_window import StepWindow

SHAPE = Shape(sizes=(3, 3, 3, 3), budget=2)


def setup() -> tuple[Any, torch.optim.Optimizer, StepWindow]:
    model = models.tiny_transformer().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rollouts = make_rollouts(SHAPE, models.VOCABULARY, 0)
    for p in model.parameters():
        p.grad = 0.01 * torch.ones_like(p)
    a = torch.linspace(-1, 1, rollouts.n_sequences, dtype=torch.float64)[:, None] * (rollouts.loss_mask == 1)
    return model, optimizer, StepWindow(rollouts, a, functionals={"mine": torch.arange(rollouts.n_sequences).double()})


def forecaster(**options: Any) -> tuple[StepForecaster, StepWindow]:
    model, optimizer, window = setup()
    estimate = EstimateOptions(weighting="sequence", baseline="responses")
    return StepForecaster(model, optimizer, **{"estimate": estimate, "budget": None, **options}), window


def test_numbers_and_names() -> None:
    own, window = forecaster()
    found = own.before_step(0, lambda: window)
    metrics = found.metrics()
    assert found.result is not None and found.result.split is not None
    assert metrics["direct"] == found.result.split.direct.value and metrics["total"] == found.result.delta_h1
    assert math.isfinite(metrics["forecast/mine"]) and metrics["prompts"] == 4
    assert math.isnan(metrics["realised"]) and math.isnan(metrics["slope"])
    assert metrics["seconds"] > 0 and own.time.spent == pytest.approx(metrics["seconds"])
    assert [(row.step, row.part) for row in own.ledger.rows()] == [(0, p) for p in ("total", "direct", "visitation")]
    assert own.last is found


def test_a_failing_hook_keep_or_ledger_is_a_warning_each_and_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    own, window = forecaster(on_forecast=[broken], keep=broken)
    monkeypatch.setattr(own.ledger, "record", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            found = own.before_step(step, lambda: window)
            assert found.result is not None and not found.failed
    said = [str(w.message) for w in caught if issubclass(w.category, EntropyFastWarning)]
    assert len(said) == 3
    for text in ("kept", "ledger", "hook"):
        assert sum(text in one.split("(")[0] for one in said) == 1


def test_warnings_that_are_errors_do_not_end_the_training() -> None:
    own, _ = forecaster()

    def no_window() -> StepWindow:
        raise RuntimeError("no batch")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = own.before_step(0, no_window)
    assert found.failed and found.result is None and math.isnan(found.metrics()["total"])
    assert all(isinstance(value, float) for value in found.metrics().values())


def test_a_rate_of_zero_and_a_window_without_responses_are_passed_over() -> None:
    own, window = forecaster()
    for group in own.optimizer.param_groups:
        group["lr"] = 0.0
    found = own.before_step(0, lambda: window)
    assert (found.failed, found.result, found.reason) == (False, None, "the learning rate is 0")


def test_the_budget_is_kept() -> None:
    own, window = forecaster(budget=0.1)
    first = own.before_step(0, lambda: window)
    assert first.result is not None and first.metrics()["prompts"] == 3  # the smallest, since no cost is known
    second = own.before_step(1, lambda: window)
    assert second.result is None and second.reason is not None and "time budget" in second.reason
    own.time.train(1000 * own.time.spent)
    third = own.before_step(2, lambda: window)
    assert third.result is not None and third.metrics()["prompts"] == 4


def test_options_that_cannot_be_used(tmp_path: Path) -> None:
    model, optimizer, _ = setup()
    bad: list[dict[str, Any]] = [
        {"every_n_steps": 0}, {"every_n_steps": True}, {"sample": 1}, {"sample": "all"}, {"verify": "held out"},
        {"budget": 0.0},
    ]  # fmt: skip
    for options in bad:
        with pytest.raises(ConfigError, match=next(iter(options))):
            StepForecaster(model, optimizer, **options)
