"""The direct and the visitation part of δH₁: by loops and plain autograd, by finite differences, and by every engine.

Legend: H_t entropy of the distribution that response token t is drawn from, w_i length weight, G responses and B prompts,
X_n^direct = Σ_i w_i Σ_t ∇H_t / G, Y_m preconditioned update gradient, K_nm = X_n · Y_m.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import cross_kernel, preconditioner, prompt_gradients, relative_error
from probe_oracle.u_statistics import jackknife, singles
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, EstimateOptions, Rollouts, fast_delta_h1
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.forecast import Forecast

Setup = tuple[nn.Module, torch.optim.Optimizer]
SHAPE = Shape(budget=2)
WEIGHTINGS = ("dr_grpo", "per_token", "sequence")


def batch(seed: int = 0) -> Rollouts:
    return make_rollouts(SHAPE, models.VOCABULARY, seed)


def forecast(setup: Setup, rollouts: Rollouts, entropy: Rollouts | None = None, **options: Any) -> DeltaH1Result:
    chosen = options_of(entropy_estimator="rao_blackwell", learning_rate=1.0, **options)
    return fast_delta_h1(*setup, rollouts, entropy_rollouts=entropy, **chosen)


def weighted_entropies(model: nn.Module, rollouts: Rollouts, weighting: str) -> list[Tensor]:
    """Σ_i w_i Σ_t H_t / G of every prompt, one unpadded sequence at a time, with a graph."""
    groups = list(dict.fromkeys(rollouts.group_ids.tolist()))
    totals = []
    for place, group in enumerate(groups):
        rows = [row for row in range(len(rollouts.group_ids)) if int(rollouts.group_ids[row]) == group]
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            real = [t for t in range(rollouts.input_ids.shape[1]) if rollouts.attention_mask[row, t] == 1]
            ids = torch.tensor([[int(rollouts.input_ids[row, t]) for t in real]])
            scored = [int(rollouts.loss_mask[row, t]) for t in real]
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(real))[None]
            ).logits[0]
            length = sum(scored)
            budget = int(rollouts.max_lengths[place])  # type: ignore[index]
            weight = {"dr_grpo": 1 / budget, "per_token": 1 / length, "sequence": 1.0}[weighting]
            for position in range(1, len(real)):
                if scored[position]:
                    log_p = torch.log_softmax(logits[position - 1], 0)
                    total = total - weight * (log_p.exp() * log_p).sum() / len(rows)
        totals.append(total)
    return totals


def direct_gradients(model: nn.Module, rollouts: Rollouts, weighting: str) -> Tensor:
    """[B, D] X_n^direct."""
    was_training = model.training
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for total in weighted_entropies(model, rollouts, weighting):
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        found.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    model.train(was_training)
    return torch.stack(found)


def close(found: object, expected: object) -> None:
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tiny", {"engine": "two_pass"}),
        ("tiny", {"engine": "one_pass"}),
        ("qwen2", {"engine": "one_pass"}),
        ("qwen2", {"engine": "one_pass", "memory_budget": 1}),
    ],
    ids=["two_pass", "own logits", "packed", "second sweep"],
)
def test_one_batch(setups: dict[str, Setup], family: str, options: dict[str, Any], weighting: str) -> None:
    setup, rollouts = setups[family], batch()
    result = forecast(setup, rollouts, weighting=weighting, **options)
    y = prompt_gradients(*setup, rollouts, weighting).y
    kernel = cross_kernel(direct_gradients(setup[0], rollouts, weighting), y)
    B = len(kernel)
    split = result.split
    assert split is not None
    close(split.direct.value, (kernel.sum() - kernel.trace()) / (B * (B - 1)))
    rows = (kernel.sum(1) - kernel.diagonal()) / (B - 1)
    close(split.direct.std_error, rows.std() / math.sqrt(B))
    close(split.direct.population_std_error, jackknife(kernel, singles(kernel)))
    close(split.on_batch, kernel.sum() / B**2)
    off = kernel - torch.diag(kernel.diagonal())
    close(split.direct.by_unit, (off.sum(1) + off.sum(0)) / (2 * B * (B - 1)))
    close(split.total.by_unit, [p.delta_h1 for p in result.per_prompt])
    assert split.total.value == result.delta_h1
    assert split.total.std_error == result.std_error
    assert abs(split.direct.value + split.visitation.value - result.delta_h1) <= 1e-12 * abs(split.visitation.value)
    alone = forecast(setup, rollouts, weighting=weighting, parts=("direct",), **options)
    assert alone.split is not None
    for name in ("value", "std_error", "population_std_error", "by_unit"):
        close(getattr(alone.split.direct, name), getattr(split.direct, name))
    close(alone.split.on_batch, split.on_batch)
    close([p.delta_h1 for p in alone.per_prompt], split.direct.by_unit)
    unknown = (alone.delta_h1, alone.std_error, alone.split.total.value, alone.split.visitation.value)
    assert all(map(math.isnan, unknown))


@pytest.mark.parametrize("engine", ["two_pass", "one_pass", "jvp"])
def test_two_batches(setups: dict[str, Setup], engine: str) -> None:
    setup, entropy, update = setups["qwen2"], batch(1), batch(2)
    result = forecast(setup, update, entropy, weighting="per_token", engine=engine)
    y = prompt_gradients(*setup, update, "per_token").y
    projections = direct_gradients(setup[0], entropy, "per_token") @ y.mean(0)
    split = result.split
    assert split is not None
    close(split.direct.value, projections.mean())
    close(split.direct.std_error, projections.std() / math.sqrt(len(projections)))
    close(split.on_batch, projections.mean())
    close(split.direct.by_unit, projections / len(projections))
    assert split.total.std_error == result.std_error
    assert abs(split.direct.value + split.visitation.value - result.delta_h1) <= 1e-12 * abs(split.visitation.value)
    assert math.isnan(split.direct.population_std_error) == (engine == "jvp")


def test_visitation_by_two_passes_and_by_one(setups: dict[str, Setup]) -> None:
    found = [forecast(setups["qwen2"], batch(), engine=engine).split for engine in ("one_pass", "two_pass")]
    assert found[0] is not None
    assert found[1] is not None
    for name in ("value", "std_error", "population_std_error"):
        close(getattr(found[0].visitation, name), getattr(found[1].visitation, name))


def test_on_batch_is_what_scoring_again_gives(setups: dict[str, Setup]) -> None:
    """The mean entropy of the same responses after a small step along Ȳ, and after one back, by plain forwards."""
    model, optimizer = setups["tiny"]
    rollouts = batch()
    split = forecast((model, optimizer), rollouts, weighting="per_token").split
    assert split is not None
    step = prompt_gradients(model, optimizer, rollouts, "per_token").y.mean(0)
    assert step.shape == preconditioner(model, optimizer).shape
    size = 1e-5 / float(step.abs().max())

    def entropy_after(factor: float) -> float:
        moved = 0
        with torch.no_grad():
            for parameter in model.parameters():
                part = step[moved : moved + parameter.numel()].view(parameter.shape)
                parameter.add_(part, alpha=factor)
                moved += parameter.numel()
            totals = weighted_entropies(model.eval(), rollouts, "per_token")
            model.train()
        return float(torch.stack(totals).mean())

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forward = entropy_after(size)
    backward = entropy_after(-2 * size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    assert (forward - backward) / (2 * size) == pytest.approx(split.on_batch, rel=1e-6)


def test_blocks_and_shares_of_sequences_stay_what_they_are(setups: dict[str, Setup]) -> None:
    setup, rollouts = setups["qwen2"], batch()
    for options in ({"blocks": 3}, {"by_sequence": True}):
        with_split = forecast(setup, rollouts, **options)
        plain = fast_delta_h1(
            *setup, rollouts, **options_of(entropy_estimator="rao_blackwell", learning_rate=1.0, **options)
        )
        close(with_split.row_sums, plain.row_sums)
        close([p.delta_h1 for p in with_split.per_prompt], [p.delta_h1 for p in plain.per_prompt])
        if plain.by_sequence is not None and with_split.by_sequence is not None:
            close(with_split.by_sequence["both"].delta_h1, plain.by_sequence["both"].delta_h1)


def test_a_split_of_log_probs_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="which has none"):
        EstimateOptions(parts=("direct", "visitation"), entropy_estimator="score_function")


def test_what_is_established() -> None:
    def forecast(*numbers: float, n: int = 8) -> Forecast:
        return Forecast(*numbers, n, torch.full((n,), numbers[0] / n))

    assert forecast(-1.0, 0.1, math.nan).established is True
    assert forecast(-1.0, 0.9, 0.9).established is False
    assert forecast(-1.0, math.nan, 0.1).established is None
    low, high = forecast(2.0, 1.0, 5.0, n=4).interval(0.95)
    # Student's t with three degrees of freedom, from a table.
    assert (low, high) == (pytest.approx(2 - 3.1824, abs=1e-4), pytest.approx(2 + 3.1824, abs=1e-4))
    with pytest.raises(ConfigError, match="level"):
        forecast(1.0, 1.0, 1.0).interval(1.0)
