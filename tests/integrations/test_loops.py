"""Forecasts around a plain loop's step, and what the step did, against autograd and against scoring by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from torch import Tensor, nn

from entropy_fast import EstimateOptions, Rollouts, RunOptions, fast_delta_h1
from entropy_fast.errors import ConfigError
from entropy_fast.integrations.looking_back import KeptPolicy
from entropy_fast.integrations.loops import forecast_step
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.truth import policy_scores

SHAPE = Shape(sizes=(4, 4, 4, 4, 4), budget=3)
OPTIONS = EstimateOptions(weighting="sequence", baseline="responses")


def setup(lr: float = 1e-3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = models.tiny_transformer().train()
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def scored(model: nn.Module, batch: Rollouts) -> tuple[Tensor, Tensor]:
    """[N, T] log-probs and entropies at response tokens, 0 elsewhere."""
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    log_p = logits[:, :-1].log_softmax(-1)
    s = log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    h = -(log_p.exp() * log_p).sum(-1)
    mask = batch.loss_mask[:, 1:] == 1
    return tuple(torch.nn.functional.pad(torch.where(mask, t, 0.0), (1, 0)) for t in (s, h))  # type: ignore[return-value]


def backward(model: nn.Module, batch: Rollouts) -> Tensor:
    """A loss that weighs tokens unlike; [N, T] its coefficients."""
    weights = torch.linspace(-1, 1, batch.input_ids.numel(), dtype=torch.float64).view_as(batch.input_ids)
    weights = weights * (batch.loss_mask == 1)
    s, _ = scored(model, batch)
    (-(weights * s).sum()).backward()
    return weights


def by_prompt(batch: Rollouts, values: Tensor, share: Tensor | None = None) -> Tensor:
    """[B] means over the prompts' responses that have tokens; with log-weights, normalised within the prompt, weighted ones."""
    found = []
    for n in range(batch.n_prompts):
        rows = batch.rows_of_prompt(n)
        rows = rows[batch.response_lengths[rows] > 0]
        own = values[rows]
        if share is None:
            found.append(own.mean())
        else:
            found.append(len(rows) / (len(rows) - 1) * ((share[rows].softmax(0) * own).sum() - own.mean()))
    return torch.stack(found)


def test_the_forecast_is_that_of_the_gradient_and_the_block_takes_the_step() -> None:
    model, optimizer = setup()
    batch = make_rollouts(SHAPE, models.VOCABULARY, 0)
    coefficients = backward(model, batch)
    expected = fast_delta_h1(
        model, optimizer, batch, coefficients=coefficients,
        estimate=EstimateOptions(weighting="sequence", baseline="responses", step="next"),
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    with forecast_step(model, optimizer, batch, coefficients=coefficients, estimate=OPTIONS) as step:
        assert all(torch.equal(p, own) for p, own in zip(model.parameters(), before, strict=True))
        optimizer.step()
    assert not all(torch.equal(p, own) for p, own in zip(model.parameters(), before, strict=True))
    assert step.realised is None
    assert step.result.delta_h1 == pytest.approx(expected.delta_h1, rel=1e-9)
    window = StepWindow(batch, coefficients)
    with (
        pytest.raises(ConfigError, match="which has its own"),
        forecast_step(model, optimizer, window, coefficients=coefficients),
    ):
        pass


def test_what_the_step_did_is_what_scoring_says() -> None:
    model, optimizer = setup(lr=1e-2)
    batch, held_out = (make_rollouts(SHAPE, models.VOCABULARY, seed) for seed in (0, 1))
    backward(model, batch)
    with torch.no_grad():
        s0, h0 = scored(model, held_out)
    with forecast_step(model, optimizer, batch, held_out=held_out, estimate=OPTIONS) as step:
        optimizer.step()
    with torch.no_grad():
        s1, h1 = scored(model, held_out)
    done = step.realised
    assert done is not None and done.prompts == held_out.n_prompts
    change = by_prompt(held_out, h1.sum(1) - h0.sum(1))
    assert done.direct == pytest.approx(float(change.mean()), rel=1e-9)
    assert done.direct_error == pytest.approx(float(change.std() / len(change) ** 0.5), rel=1e-9)
    visits = by_prompt(held_out, h1.sum(1), s1.sum(1) - s0.sum(1))
    assert done.total == pytest.approx(float((change + visits).mean()), rel=1e-9)


def test_looking_back_from_the_moved_policys_own_responses() -> None:
    """Seen from the policy after the step, the change back has the roles of the two exchanged."""
    model, optimizer = setup(lr=1e-2)
    batch, later = (make_rollouts(SHAPE, models.VOCABULARY, seed) for seed in (0, 1))
    backward(model, batch)
    kept = KeptPolicy(model)
    with torch.no_grad():
        s0, h0 = scored(model, later)
    optimizer.step()
    moved = [p.detach().clone() for p in model.parameters()]
    found = kept.change_since(optimizer, later, estimate=OPTIONS, run=RunOptions())
    assert all(torch.equal(p, own) for p, own in zip(model.parameters(), moved, strict=True))
    with torch.no_grad():
        s1, h1 = scored(model, later)
    back = by_prompt(later, h0.sum(1) - h1.sum(1))
    visits = by_prompt(later, h0.sum(1), s0.sum(1) - s1.sum(1))
    assert found.direct == pytest.approx(-float(back.mean()), rel=1e-9)
    assert found.total == pytest.approx(-float((back + visits).mean()), rel=1e-9)
    assert 0 < found.ess <= 1 and not math.isnan(found.total_error)


def test_parameters_come_back_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = setup(lr=1e-2)
    batch = make_rollouts(SHAPE, models.VOCABULARY, 0)
    backward(model, batch)
    kept = KeptPolicy(model)
    optimizer.step()
    moved = [p.detach().clone() for p in model.parameters()]

    def broken_with_the_old_policy(*args: Any, **options: Any) -> Any:
        if all(torch.equal(p, own) for p, own in zip(model.parameters(), moved, strict=True)):
            return policy_scores.scored(*args, **options)
        raise RuntimeError("while the old policy is in place")

    monkeypatch.setattr("entropy_fast.integrations.looking_back.scored", broken_with_the_old_policy)
    with pytest.raises(RuntimeError, match="in place"):
        kept.change_since(optimizer, batch, estimate=OPTIONS, run=RunOptions())
    assert all(torch.equal(p, own) for p, own in zip(model.parameters(), moved, strict=True))
