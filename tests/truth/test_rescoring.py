"""What a step really does to a batch's entropy at its own prefixes: against the forecast, and the model is given back."""

from __future__ import annotations

import pytest
import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from torch import nn

from entropy_fast import EstimateOptions, Rollouts, fast_delta_h1
from entropy_fast.engines.one_pass import OnePassEngine
from entropy_fast.errors import LearningRateError
from entropy_fast.truth import rescored_entropy

SHAPE = Shape(budget=2, empty=1)

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def case(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Rollouts]:
    model = getattr(models, name)()
    return model.train(), models.stepped_adam(model), make_rollouts(SHAPE, models.VOCABULARY, 3)


@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token", "sequence", "pooled"])
@pytest.mark.parametrize("name", ["tiny_transformer", "gpt2"])
def test_a_small_step_does_what_the_direct_part_on_the_batch_says(name: str, weighting: str) -> None:
    model, optimizer, rollouts = case(name)
    before = [p.detach().clone() for p in model.parameters()]
    options = {"weighting": weighting, "entropy_estimator": "rao_blackwell", "engine": "one_pass"}
    forecast = fast_delta_h1(model, optimizer, rollouts, **options_of(learning_rate=1e-6, **options))
    estimate = EstimateOptions(weighting=weighting)  # type: ignore[arg-type]
    small, large = rescored_entropy(model, optimizer, rollouts, [1e-6, 3e-3], estimate=estimate)
    assert forecast.split is not None
    assert small.symmetric == pytest.approx(forecast.split.on_batch, rel=1e-6)
    # One way, curvature along the step shows, the more the longer it is.
    off = [abs(s.forward / s.symmetric - 1) for s in (small, large)]
    assert 0 < off[0] < 1e-2
    assert off[1] > 100 * off[0]
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_comes_back_when_scoring_fails(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    model, optimizer, rollouts = case("tiny_transformer")
    before = [p.detach().clone() for p in model.parameters()]
    score, calls = OnePassEngine.score, []

    def failing(self: OnePassEngine, batch: Rollouts) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return score(self, batch)

    monkeypatch.setattr(OnePassEngine, "score", failing)
    with pytest.raises(error):
        rescored_entropy(model, optimizer, rollouts, [1e-3])
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_a_learning_rate_of_nothing_is_refused() -> None:
    model, optimizer, rollouts = case("tiny_transformer")
    with pytest.raises(LearningRateError, match="learning rates are"):
        rescored_entropy(model, optimizer, rollouts, [1e-3, 0.0])
