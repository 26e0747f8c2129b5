"""Updates instead of the one in .grad, from a sample of the prompts: against loops and the optimizer's own step.

Legend: X_n entropy gradient of prompt n, g_n its ascent gradient in the update that is taken and c_n in another,
d_n = c_n - g_n; B prompts of which n are sampled, L gradient of the loss, Δθ(L) what the optimizer adds. The other update's
gradient is L - mean of d over the sample; a prompt's own part is taken out of both terms.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import prompt_gradients
from probe_oracle.token_gradients import flat_gradient, groups_of, prompt_gradients_of, token_values
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, candidates, fast_delta_h1
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.comparison import beyond
from entropy_fast.estimates.kernel_sums import AlongStep, KernelSums, SampledUpdate
from entropy_fast.estimates.measured import UpdateSums
from entropy_fast.estimates.split import Scale, forecasts_of

Setup = tuple[nn.Module, torch.optim.Optimizer]
SHAPE = Shape(sizes=(3, 2, 4, 3, 2, 3), budget=2)
BATCH = make_rollouts(SHAPE, models.VOCABULARY, 0)
B = len(SHAPE.sizes)
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.5),
}


def setup(name: str) -> Setup:
    model = models.tiny_transformer().train()
    optimizer = OPTIMIZERS[name](model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return model, optimizer


def tables(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, e = (torch.randn(BATCH.loss_mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return 0.1 * a * BATCH.loss_mask, 0.03 * e * BATCH.loss_mask


def flat_moved(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    model, optimizer = copy.deepcopy((model, optimizer))
    parameters = list(model.parameters())
    before = torch.nn.utils.parameters_to_vector(parameters).detach()
    for p, g in zip(parameters, loss.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()
    optimizer.step()
    return torch.nn.utils.parameters_to_vector(parameters).detach() - before


def fill(model: nn.Module, loss: Tensor) -> None:
    for p, own in zip(model.parameters(), loss.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = own.view_as(p).clone()


def entropy_gradients(model: nn.Module) -> Tensor:
    """[B, D] of the score function's entropy."""
    plain = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.0, 0.0), eps=0.0)  # P = 1
    for p in model.parameters():
        plain.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
    return prompt_gradients(model, plain, BATCH, "dr_grpo").x


def forecast(own: Setup, planned: Any, **given: Any) -> DeltaH1Result:
    updates, scores = given.pop("updates", None), given.pop("scores", None)
    asked = options_of(step="next", gradient="live", **given)
    return fast_delta_h1(*own, BATCH, coefficients=planned, updates=updates, scores=scores, **asked)


def close(found: float, expected: float, scale: float) -> None:
    assert abs(found - expected) <= 1e-9 * scale, (found, expected, scale)


@pytest.mark.parametrize(
    ("name", "clip", "sample"),
    [
        ("adamw", 0.3, 4),
        *(
            pytest.param(name, clip, sample, marks=pytest.mark.exhaustive)
            for name, clip in (("adamw", 1.0), ("momentum", 0.3), ("rmsprop", 1.0))
            for sample in (4, None)
        ),
    ],
)
def test_it_is_what_loops_over_prompts_say(name: str, clip: float, sample: int | None) -> None:
    own = model, _ = setup(name)
    planned, other = tables(1), tables(2)
    # Of the whole batch's mean over prompts.
    g, c = (B * prompt_gradients_of(model, BATCH, *pair) for pair in (planned, other))
    x, loss = entropy_gradients(model), -clip * g.mean(0)
    fill(model, loss / clip)
    most = None if clip == 1 else clip * (float(loss.norm()) / clip + 1e-6)
    found = forecast(own, planned, updates={"other": other}, sample=sample, max_grad_norm=most)
    order = list(dict.fromkeys(BATCH.group_ids.tolist()))
    taken = [order.index(p.group_ids[0]) for p in found.per_prompt]
    n, f = len(taken), len(taken) / B
    assert n == (sample or B)
    x, g, c = x[taken], g[taken], c[taken]
    d = c - g

    def step(gradient: Tensor) -> Tensor:
        return flat_moved(*own, gradient)

    rows, base, y = [], [], []
    for u in range(n):
        rest = [v for v in range(n) if v != u]
        others = (B * loss + clip * g[u]) / (B - 1)
        base.append(x[u] @ step(others))
        rows.append(x[u] @ step(others - clip * d[rest].mean(0)))
        lacking = step(loss - clip * d.mean(0)) - step(loss - clip * d[rest].mean(0))
        y.append(x[rest].sum(0) @ lacking)
    r, r0, z = torch.stack(rows), torch.stack(base), torch.stack(y)
    scale = float(r.abs().sum() + z.abs().sum())
    ours, theirs = found.updates["other"].forecast, found.compared["other"].forecast
    close(found.delta_h1, float(r0.mean()), scale)
    close(ours.value, float(r.mean()), scale)
    close(theirs.value, float((r - r0).mean()), scale)

    def error(values: Tensor) -> float:
        return math.sqrt(float((values + (1 - f) * z).var()) / n + f * (1 - f) * float(z.var()) / n)

    close(ours.std_error, error(r), scale)
    close(theirs.std_error, error(r - r0), scale)
    assert (float(z.abs().sum()) > 0) and math.isnan(theirs.population_std_error)
    torch.testing.assert_close(ours.by_unit * n, r, rtol=0, atol=1e-9 * scale)
    assert theirs.by_parameter is not None
    close(sum(theirs.by_parameter.values()), theirs.value, scale)


@pytest.mark.exhaustive
def test_of_all_prompts_it_is_the_forecast_of_that_gradient() -> None:
    """As if the other update's gradient had stood in .grad, and as if it had been described."""
    own = model, _ = setup("adamw")
    planned, other = tables(1), tables(2)
    options = {"entropy_estimator": "rao_blackwell"}
    for pair in (other, planned):
        fill(model, -prompt_gradients_of(model, BATCH, *pair).sum(0))
        if pair is other:
            alone = forecast(own, other, **options)
    numbers = {"mine": torch.arange(BATCH.n_sequences).double()}
    asked = options_of(step="next", gradient="live", **options)
    found = fast_delta_h1(*own, BATCH, coefficients=planned, updates={"other": other}, functionals=numbers, **asked)
    scale = float(alone.forecast.by_unit.abs().sum())
    other_found, difference = found.updates["other"], found.compared["other"]
    assert other_found.split is not None and alone.split is not None
    assert difference.split is not None and found.split is not None
    for part in ("total", "direct", "visitation"):
        ours, theirs = getattr(other_found.split, part), getattr(alone.split, part)
        close(ours.value, theirs.value, scale)
        close(ours.std_error, theirs.std_error, scale)
        close(getattr(difference.split, part).value, ours.value - getattr(found.split, part).value, scale)
    close(other_found.split.on_batch, alone.split.on_batch, scale)
    close(difference.split.on_batch, alone.split.on_batch - found.split.on_batch, scale)
    mine = difference.functionals["mine"]
    close(mine.value, other_found.functionals["mine"].value - found.functionals["mine"].value, abs(mine.value))


def test_the_same_update_differs_by_nothing_and_a_bonus_is_worked_out_of_the_whole_batch() -> None:
    own = model, _ = setup("adamw")
    planned = tables(1)
    fill(model, -prompt_gradients_of(model, BATCH, *planned).sum(0))
    s = token_values(model, BATCH)[0].detach()
    mask = BATCH.loss_mask.double()
    seen: list[torch.Size] = []

    def coupled(logprobs: Tensor, entropies: Tensor) -> Tensor:
        """The planned loss and a bonus by how surprising the batch is."""
        seen.append(logprobs.shape)
        bonus = (entropies * mask).sum() * (logprobs.detach() * mask).sum() / mask.sum()
        return -(planned[0] * logprobs).sum() - (planned[1] * entropies).sum() - 0.01 * bonus

    updates = {
        "same": planned,
        "bonus": candidates.entropy_bonus(0.05),
        "coupled": coupled,
        "none": candidates.reweighted(),
    }
    found = forecast(own, planned, updates=updates, sample=3, weighting="pooled")
    assert seen == [BATCH.loss_mask.shape]
    scale = float(found.forecast.by_unit.abs().sum())
    for name in ("same", "none"):
        close(found.compared[name].forecast.value, 0.0, scale)
        close(found.compared[name].forecast.std_error, 0.0, scale)
    pooled = mask / mask.sum()  # the mean over all tokens
    by_hand = {
        "bonus": (planned[0], planned[1] + 0.05 * pooled),
        "coupled": (planned[0], planned[1] + 0.01 * mask * float((s * mask).sum() / mask.sum())),
    }
    again = forecast(own, planned, updates=by_hand, sample=3, weighting="pooled")
    for name in by_hand:
        ours, theirs = found.compared[name].forecast, again.compared[name].forecast
        close(ours.value, theirs.value, scale)
        close(ours.std_error, theirs.std_error, scale)
        assert abs(ours.value) > 1e-6 * scale


@pytest.mark.exhaustive
def test_of_another_batch_nothing_is_sampled() -> None:
    own = model, _ = setup("adamw")
    planned, other = tables(1), tables(2)
    entropy = make_rollouts(SHAPE, models.VOCABULARY, 5)
    asked = options_of(step="next", gradient="live")
    fill(model, -prompt_gradients_of(model, BATCH, *other).sum(0))
    alone = fast_delta_h1(*own, BATCH, entropy_rollouts=entropy, coefficients=other, **asked)
    fill(model, -prompt_gradients_of(model, BATCH, *planned).sum(0))
    updates = {"other": other}
    found = fast_delta_h1(*own, BATCH, entropy_rollouts=entropy, coefficients=planned, updates=updates, **asked)
    scale = float(alone.forecast.by_unit.abs().sum())
    close(found.updates["other"].forecast.value, alone.delta_h1, scale)
    close(found.updates["other"].forecast.std_error, alone.std_error, scale)
    close(found.compared["other"].forecast.value, alone.delta_h1 - found.delta_h1, scale)


def test_the_error_is_that_of_repeated_samples() -> None:
    """Gaussian prompts, a linear step: how far the difference is from what the whole batch's update does to all prompts."""
    generator = torch.Generator().manual_seed(0)
    n, whole, size, trials = 8, 16, 6, 600
    mean_x, mean_d = torch.ones(size).double(), 0.5 * torch.ones(size).double()
    scale = Scale(1.0, n, n, ("p",), {}, ())
    squares, errors = [], []
    for _ in range(trials):
        noise = torch.randn(whole, size, generator=generator, dtype=torch.float64)
        d = mean_d + noise
        # The same samples make both.
        x = mean_x + 0.7 * noise + torch.randn(whole, size, generator=generator, dtype=torch.float64)
        x_s, d_s = x[:n], d[:n]
        others = (d_s.sum(0) - d_s) / (n - 1)
        rows = (x_s * others).sum(1)
        y = ((x_s.sum(0) - x_s) / (n - 1) * (d_s - d_s.mean(0))).sum(1)
        sums = _sums(rows, SampledUpdate(y, n / whole))
        base = _sums(torch.zeros_like(rows), None)
        pairs = UpdateSums(base, {}), UpdateSums(sums, {})
        found = beyond(*pairs, scale, forecasts_of(pairs[1], scale), forecasts_of(pairs[0], scale)).forecast
        squares.append((found.value - float(mean_x @ d.mean(0))) ** 2)
        errors.append(found.std_error**2)
    assert sum(errors) / sum(squares) == pytest.approx(1.0, abs=0.2)


def _sums(rows: Tensor, sampled: SampledUpdate | None) -> KernelSums:
    unknown = torch.full_like(rows, math.nan)
    along = AlongStep({"fresh": rows[None]}, {"fresh": math.nan}, sampled)
    return KernelSums(math.nan, unknown, unknown, unknown, torch.ones(len(rows)), along=along)


@pytest.mark.exhaustive
def test_tokens_of_a_sample_stand_in_the_rows_of_the_batch() -> None:
    own = model, optimizer = setup("adamw")
    planned = tables(1)
    fill(model, -prompt_gradients_of(model, BATCH, *planned).sum(0))
    found = forecast(own, planned, sample=3, by_token=True, entropy_estimator="rao_blackwell", parts=("direct",))
    assert found.split is not None
    shares = found.split.direct.by_token
    assert shares is not None and shares.shape == BATCH.loss_mask.shape
    scale = float(found.forecast.by_unit.abs().sum())
    order = list(dict.fromkeys(BATCH.group_ids.tolist()))
    taken = [order.index(p.group_ids[0]) for p in found.per_prompt]
    g = B * prompt_gradients_of(model, BATCH, *planned)
    _, h = token_values(model, BATCH)
    loss = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    budgets = BATCH.max_lengths
    assert budgets is not None
    for place, members in enumerate(groups_of(BATCH)):
        if place not in taken:
            at = BATCH.loss_mask[members] == 1
            assert bool(shares[members][at].isnan().all()) and bool((shares[members][~at] == 0).all())
            continue
        step = flat_moved(model, optimizer, (B * loss + g[place]) / (B - 1))
        for row in members:
            for column in (BATCH.loss_mask[row] == 1).nonzero().flatten().tolist():
                weight = 1 / (int(budgets[place]) * len(members) * len(taken))
                close(float(shares[row, column]), weight * float(flat_gradient(h[row, column], model) @ step), scale)
    close(float(shares.nansum()), found.split.direct.value, scale)


def test_what_does_not_go_with_it() -> None:
    own = model, _ = setup("momentum")
    planned = tables(1)
    fill(model, -prompt_gradients_of(model, BATCH, *planned).sum(0))
    bonus = {"bonus": candidates.entropy_bonus(0.1)}
    with pytest.raises(ConfigError, match="without `coefficients`"):
        forecast(own, None, updates=bonus)
    with pytest.raises(ConfigError, match="one sample"):
        forecast(own, planned, updates=bonus, relative_error=0.1, entropy_estimator="rao_blackwell")
    with pytest.raises(ConfigError, match="changes options that describe the update"):
        forecast(own, planned, updates={"higher": candidates.clip_higher()})
