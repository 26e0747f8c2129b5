"""What a step really does: against the real optimizer's step and loops, against the forecast, and the model is given back."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from torch import Tensor, nn

from entropy_fast import EstimateOptions, Rollouts, fast_delta_h1
from entropy_fast.engines.one_pass import OnePassEngine
from entropy_fast.errors import ConfigError, LearningRateError, RolloutsError
from entropy_fast.truth import measure_delta_h

SHAPE = Shape(budget=2, empty=1)
FIRST = ("tiny_transformer", "dr_grpo", "next")
WEIGHTINGS = ["dr_grpo", "per_token", "sequence", "pooled"]
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": models.stepped_adam,
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4, weight_decay=0.1),
}

# Every model, weighting and step with the first of the others, and the rest where all is asked for.
CASES = [
    pytest.param(
        *case, marks=[] if sum(n != first for n, first in zip(case, FIRST, strict=True)) < 2 else pytest.mark.exhaustive
    )
    for case in itertools.product(("tiny_transformer", "gpt2"), WEIGHTINGS, ("next", "adam_static"))
]

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def case(name: str = "tiny_transformer", optimizer: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer, Rollouts]:
    model = getattr(models, name)().train()
    found = OPTIMIZERS[optimizer](model)
    if optimizer != "adamw":
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        found.step()
        found.zero_grad()
    return model, found, make_rollouts(SHAPE, models.VOCABULARY, 3)


def entropies(model: nn.Module, rollouts: Rollouts) -> list[tuple[int, float, float, int]]:
    """Group, S_i, Σ_t H_t and length of every row with a response, one unpadded sequence at a time."""
    found = []
    model = copy.deepcopy(model).eval()
    for row in range(rollouts.n_sequences):
        real = [t for t in range(rollouts.input_ids.shape[1]) if rollouts.attention_mask[row, t] == 1]
        scored = [int(rollouts.loss_mask[row, t]) for t in real]
        if not sum(scored):
            continue
        ids = rollouts.input_ids[row, real][None]
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(real))[None])
        log_p = torch.log_softmax(out.logits[0], -1)
        places = [t for t in range(1, len(real)) if scored[t]]
        total = -sum(float((log_p[t - 1].exp() * log_p[t - 1]).sum()) for t in places)
        said = sum(float(log_p[t - 1, ids[0, t]]) for t in places)
        found.append((int(rollouts.group_ids[row]), said, total, len(places)))
    return found


def level(model: nn.Module, rollouts: Rollouts) -> float:
    """Mean over prompts of the means of responses' mean token entropies."""
    rows = entropies(model, rollouts)
    groups = list(dict.fromkeys(group for group, *_ in rows))
    return sum(
        sum(h / n for g, _, h, n in rows if g == group) / sum(g == group for g, *_ in rows) for group in groups
    ) / len(groups)


@pytest.mark.parametrize(("name", "weighting", "step"), CASES)
def test_a_small_step_does_what_the_direct_part_on_the_batch_says(name: str, weighting: str, step: Any) -> None:
    model, optimizer, rollouts = case(name)
    before = [p.detach().clone() for p in model.parameters()]
    options = {"weighting": weighting, "entropy_estimator": "rao_blackwell", "step": step, "max_grad_norm": None}
    forecast = fast_delta_h1(model, optimizer, rollouts, **options_of(**options))
    estimate = EstimateOptions(weighting=weighting, step=step)  # type: ignore[arg-type]
    told: list[tuple[str, int, int]] = []
    found = measure_delta_h(
        model,
        optimizer,
        rollouts,
        etas=[1e-3, 10.0],
        estimate=estimate,
        on_progress=lambda *reported: told.append(reported),
    )
    assert told == [("multiples", done, 2) for done in range(3)]
    assert forecast.split is not None and found.geometry == forecast.geometry
    small, large = found.points
    assert small.symmetric.direct == pytest.approx(1e-3 * forecast.split.on_batch, rel=1e-6)
    # One way, curvature along the step shows, and the second order makes up for most of it.
    assert small.direct == pytest.approx(small.symmetric.direct + small.second_order, rel=1e-12)
    off = [abs(p.direct / p.symmetric.direct - 1) for p in (small, large)]
    assert 0 < off[0] < off[1]
    assert found.level == pytest.approx(forecast.entropy_level, rel=1e-12)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert math.isnan(small.total) and math.isnan(small.ess)


@pytest.mark.parametrize("gradient", ["live", "rollouts"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_at_one_it_is_the_real_optimizer_s_step(optimizer_name: str, gradient: Any) -> None:
    model, optimizer, rollouts = case(optimizer=optimizer_name)
    held_out = make_rollouts(SHAPE, models.VOCABULARY, 4)
    generator = torch.Generator().manual_seed(1)
    if gradient == "live":
        for p in model.parameters():
            p.grad = 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    estimate = EstimateOptions(weighting="per_token", step="next", gradient=gradient)
    found = measure_delta_h(model, optimizer, rollouts, held_out=held_out, etas=[1.0], estimate=estimate).points[0]
    assert all(p.grad is g or torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))
    stepped, other = copy.deepcopy((model, optimizer))
    for p, g in zip(
        stepped.parameters(), loss_gradient(model, rollouts) if gradient == "rollouts" else kept, strict=True
    ):
        p.grad = g
    other.step()
    expected = level(stepped, rollouts) - level(model, rollouts)
    assert found.direct == pytest.approx(expected, rel=1e-7)
    assert found.held_out_direct == pytest.approx(level(stepped, held_out) - level(model, held_out), rel=1e-7)
    old, new = entropies(model, held_out), entropies(stepped, held_out)
    groups, totals = list(dict.fromkeys(g for g, *_ in old)), []
    for group in groups:
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a[0] == group]
        w = torch.tensor([b[1] - a[1] for a, b in pairs], dtype=torch.float64).softmax(0)
        after, before = (torch.tensor([p[k][2] / p[k][3] for p in pairs], dtype=torch.float64) for k in (1, 0))
        size = len(pairs)
        totals.append(float(after.mean() - before.mean() + size / (size - 1) * ((w * after).sum() - after.mean())))
    assert found.total == pytest.approx(sum(totals) / len(totals), rel=1e-6)
    assert found.total_std_error == pytest.approx(
        float(torch.tensor(totals, dtype=torch.float64).std()) / len(totals) ** 0.5, rel=1e-6
    )


def loss_gradient(model: nn.Module, rollouts: Rollouts) -> list[Tensor]:
    """Of minus the mean over prompts of Σ_i A_i S_i / (L_i G), by autograd on single sequences."""
    model = copy.deepcopy(model).eval()
    rows = [row for row in range(rollouts.n_sequences) if int(rollouts.loss_mask[row].sum())]
    groups = [int(rollouts.group_ids[row]) for row in rows]
    loss = torch.zeros((), dtype=torch.float64)
    for row, group in zip(rows, groups, strict=True):
        real = [t for t in range(rollouts.input_ids.shape[1]) if rollouts.attention_mask[row, t] == 1]
        ids = rollouts.input_ids[row, real][None]
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(real))[None])
        log_p = torch.log_softmax(out.logits[0], -1)
        places = [t for t in range(1, len(real)) if rollouts.loss_mask[row, real[t]] == 1]
        said = torch.stack([log_p[t - 1, ids[0, t]] for t in places]).mean()
        assert rollouts.advantages is not None
        loss = loss - float(rollouts.advantages[row]) * said / groups.count(group) / len(set(groups))
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=False))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_comes_back_when_scoring_fails(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    model, optimizer, rollouts = case()
    before = [p.detach().clone() for p in model.parameters()]
    score, calls = OnePassEngine.score, []

    def failing(self: OnePassEngine, batch: Rollouts) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return score(self, batch)

    monkeypatch.setattr(OnePassEngine, "score", failing)
    with pytest.raises(error):
        measure_delta_h(model, optimizer, rollouts, estimate=EstimateOptions(baseline="responses"))
    assert len(calls) == 3
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_its_own_responses_are_no_held_out_ones() -> None:
    model, optimizer, rollouts = case()
    shuffled = rollouts.select_rows(torch.randperm(rollouts.n_sequences, generator=torch.Generator().manual_seed(0)))
    for held_out in (rollouts, shuffled):
        with pytest.raises(RolloutsError, match="that the forecast was made from"):
            measure_delta_h(model, optimizer, rollouts, held_out=held_out)


def test_what_is_ambiguous_is_refused() -> None:
    model, optimizer, rollouts = case()
    other = make_rollouts(SHAPE, models.VOCABULARY, 4)
    with pytest.raises(ConfigError, match="which tokens of `held_out` count"):
        measure_delta_h(model, optimizer, rollouts, held_out=other, entropy_mask=rollouts.loss_mask)
    numbers = torch.zeros(rollouts.n_sequences)
    with pytest.raises(ConfigError, match="both give the update"):
        measure_delta_h(model, optimizer, rollouts, update=lambda s, h: s.sum(), coefficients=numbers)


def test_a_loss_sees_the_model_as_its_caller_left_it() -> None:
    model, optimizer, rollouts = case()
    seen: list[bool] = []

    def loss(s: Tensor, h: Tensor) -> Tensor:
        seen.append(model.training)
        return -(s * rollouts.loss_mask).mean()

    measure_delta_h(model, optimizer, rollouts, update=loss, etas=[1.0])
    assert seen == [True]


@pytest.mark.parametrize("etas", [[], [0.0], [1.0, -1.0], [math.inf]])
def test_multiples_are_above_nothing(etas: list[float]) -> None:
    with pytest.raises(LearningRateError, match="etas are"):
        measure_delta_h(*case(), etas=etas)


def test_a_step_that_moves_nothing_is_refused() -> None:
    model, optimizer, rollouts = case()
    with pytest.raises(LearningRateError, match="moves no parameter"):
        measure_delta_h(model, optimizer, rollouts, etas=[1e-30])


def test_fresh_responses_are_drawn_where_weights_wear_out() -> None:
    model, optimizer, rollouts = case()
    held_out, drawn = (make_rollouts(SHAPE, models.VOCABULARY, seed) for seed in (4, 5))
    seen: list[list[Tensor]] = []

    def fresh(moved: nn.Module) -> Rollouts:
        seen.append([p.detach().clone() for p in moved.parameters()])
        return drawn

    found = measure_delta_h(model, optimizer, rollouts, held_out=held_out, fresh=fresh, etas=[1e-3, 1e3]).points
    assert [p.fresh for p in found] == [False, True] and found[0].ess > 0.99 > 0.5 > found[1].ess
    (moved,) = seen
    assert any(not torch.equal(p, own) for p, own in zip(model.parameters(), moved, strict=True))
    assert found[1].total_std_error > 0


def test_what_is_below_the_floor_says_so() -> None:
    model, optimizer, rollouts = case()
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = measure_delta_h(model, optimizer, rollouts, etas=[1e-4, 100.0])
    assert [p.below_floor for p in found.points] == [True, False]
    assert found.floor == pytest.approx(4 * torch.finfo(torch.float32).eps * found.level)
