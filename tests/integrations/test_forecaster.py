"""What a training loop may rely on: nothing breaks it, nothing is 0 that is not known, and seconds are counted."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts

from entropy_fast import EstimateOptions
from entropy_fast.candidates import clip_higher, entropy_bonus, kl_cov
from entropy_fast.distributed import Team
from entropy_fast.errors import ConfigError, EntropyFastWarning
from entropy_fast.integrations.forecast_options import ForecastOptions, forecast_options
from entropy_fast.integrations.forecaster import StepForecaster
from entropy_fast.integrations.looking_back import Realised
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
    keep = options.pop("keep", None)
    asked = ForecastOptions(**{"estimate": estimate, "budget": None, "verify": None, **options})
    return StepForecaster(model, optimizer, asked, keep=keep), window


def test_numbers_and_names() -> None:
    own, window = forecaster()
    found = own.before_step(0, lambda: window)
    metrics = found.metrics()
    assert found.result is not None and found.result.split is not None
    assert metrics["direct"] == found.result.split.direct.value and metrics["total"] == found.result.delta_h1
    assert math.isfinite(metrics["forecast/mine"]) and metrics["prompts"] == 4
    assert math.isnan(metrics["realised"]) and math.isnan(metrics["slope"])
    assert 0 < metrics["seconds"] <= own.time.spent  # what hooks and the like took comes on top
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


def test_a_look_back_is_in_the_budget_before_the_forecast_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: forecasts of 1 s a prompt, looks of 2 s a prompt, steps of 20 s, and a tenth of that time."""
    now = [0.0]
    monkeypatch.setattr("entropy_fast.integrations.forecaster.time.perf_counter", lambda: now[0])
    own, window = forecaster(budget=0.1, verify="previous")

    def forecast(self: StepForecaster, _: StepWindow, prompts: int, team: Team) -> Any:
        now[0] += 1.0 * prompts
        return made

    made = own._made_from(window, 4, Team.alone())
    monkeypatch.setattr(StepForecaster, "_made_from", forecast)

    class Looked:
        needs_window = False

        def __init__(self, prompts: int) -> None:
            self.prompts = prompts

        def found(self, *_: Any) -> Any:
            now[0] += 2.0 * self.prompts
            return Realised(0.1, 0.01, 0.1, 0.01, 1.0, 0.1, self.prompts), ""

    monkeypatch.setattr(
        "entropy_fast.integrations.forecaster.verification_of", lambda options, *others: Looked(others[3])
    )
    shares = []
    for step in range(200):
        own.time.train(20.0)
        own.before_step(step, lambda: window)
        if step > 30:
            shares.append(own.time.used)
    # The first forecast, of 3 prompts, was made to find out: 3 s and a look of 6. After that nothing goes beyond the share.
    assert max(shares) <= 0.1 and own.time.used > 0.09


def test_a_number_of_prompts_that_does_not_fit_is_not_taken() -> None:
    own, window = forecaster(budget=0.1, sample=4)
    own.time.forecasts.see(4, 1.0)
    own.time.train(9.0)
    assert own.before_step(0, lambda: window).result is None
    own.time.train(2.0)
    found = own.before_step(1, lambda: window)
    assert found.result is not None and found.metrics()["prompts"] == 4


def test_candidates_are_compared_and_one_that_cannot_be_is_nan() -> None:
    candidates = {"bonus": entropy_bonus(0.1), "covariant": kl_cov(0.5)}  # the second needs what the sampler said
    own, window = forecaster(candidates=candidates)
    with pytest.warns(EntropyFastWarning, match="the candidate 'covariant' cannot be worked out"):
        found = own.before_step(0, lambda: window)
    assert found.result is not None and list(found.result.compared) == ["bonus"]
    metrics, split = found.metrics(), found.result.compared["bonus"].split
    assert split is not None
    for name, part in (("", split.total), ("_direct", split.direct)):
        assert metrics[f"candidate/bonus{name}"] == part.value
        assert metrics[f"candidate/bonus{name}_error"] == part.std_error
        assert math.isnan(metrics[f"candidate/covariant{name}"])
    # Clipping acts on both alike: coefficients stand as they are in a gradient half as large, and what the bonus adds is half.
    halved = dataclasses.replace(window, clip=0.5)
    (a, e), (b, f) = (own._other_updates(one, Team.alone())["bonus"] for one in (window, halved))
    assert torch.equal(a, b) and torch.equal(e, 2 * f) and bool((e > 0).any())
    bare = dataclasses.replace(window, scores=None)
    assert torch.equal(own._other_updates(bare, Team.alone())["bonus"][1], e)
    empty = own.before_step(1, lambda: (_ for _ in ()).throw(RuntimeError("no batch")))
    assert math.isnan(empty.metrics()["candidate/bonus_direct_error"])


def test_tokens_can_be_asked_for_until_the_step_is_taken() -> None:
    seen: list[Any] = []

    def ask(forecast: Any) -> None:
        seen.append((forecast.tokens.by_id(), forecast.tokens.lowering_most(2), forecast.result.split.direct.value))

    own, window = forecaster(on_forecast=[ask])
    named = dataclasses.replace(window, decode=lambda token: f"t{token}\x1b")
    found = own.before_step(0, lambda: named)
    ((shares, lowering, direct),) = seen
    ids = window.rollouts.input_ids[window.rollouts.loss_mask == 1]
    assert set(shares) == set(ids.tolist())
    assert sum(shares.values()) == pytest.approx(direct, rel=1e-6)
    ranked = sorted(shares, key=lambda token: shares[token])
    assert [name for name, _ in lowering] == [repr(f"t{token}\x1b") for token in ranked[:2] if shares[token] < 0]
    assert found.tokens is not None and found.tokens.by_id() == shares
    silent = forecaster()[0].before_step(0, lambda: window)
    assert silent.tokens is not None
    with pytest.raises(ConfigError, match="the step has been taken"):
        silent.tokens.by_id()


def test_options_that_cannot_be_used() -> None:
    bad: list[dict[str, Any]] = [
        {"every_n_steps": 0}, {"every_n_steps": True}, {"sample": 1}, {"sample": "all"}, {"verify": "held out"},
        {"budget": 0.0}, {"budget": "much"}, {"held_out": lambda *_: None}, {"candidates": {"": entropy_bonus(0.1)}},
        {"candidates": {"higher": clip_higher()}}, {"candidates": {"table": torch.zeros(3)}}, {"candidates": {"x": 1}},
    ]  # fmt: skip
    for options in bad:
        with pytest.raises(ConfigError, match=next(iter(options))):
            ForecastOptions(**options)
    with pytest.raises(ConfigError, match="no option 'every'"):
        forecast_options({"every": 3})
    with pytest.raises(ConfigError, match="nothing gives responses"):
        forecaster(verify="held_out")
