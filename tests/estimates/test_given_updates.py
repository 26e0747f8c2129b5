"""Forecasts of an update that is given (coefficients, or the loss itself) and of candidates, by loops and plain autograd.

Legend: L the loss, s_t log-prob and H_t entropy of response token t; X_n entropy gradient of prompt n, g_n its update gradient,
Y_m = P g_m, K_nm = X_n · Y_m, B prompts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from forecast_ways import ENGINES
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import cross_kernel, preconditioner, prompt_gradients, relative_error
from probe_oracle.token_gradients import prompt_gradients_of, token_values
from torch import Tensor, nn

from entropy_fast import DeltaH1Result, Rollouts, candidates, fast_delta_h1
from entropy_fast.columns import TokenScores
from entropy_fast.errors import ConfigError, RolloutsError
from entropy_fast.ways.packed.way import PackedWay

Setup = tuple[nn.Module, torch.optim.Optimizer]
SHAPE = Shape(budget=2, empty=1)

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def batch(seed: int = 0) -> Rollouts:
    return make_rollouts(SHAPE, models.VOCABULARY, seed)


def forecast(setup: Setup, rollouts: Rollouts, entropy: Rollouts | None = None, **options: Any) -> DeltaH1Result:
    asked = ("update", "coefficients", "updates", "scores", "functionals", "entropy_mask")
    given = {name: options.pop(name) for name in asked if name in options}
    return fast_delta_h1(
        *setup, rollouts, entropy_rollouts=entropy, **options_of(learning_rate=1.0, **options), **given
    )


def close(found: object, expected: object, tolerance: float = 1e-9) -> None:
    assert relative_error(found, expected) < tolerance


def tables(rollouts: Rollouts, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Some coefficients [N, T] of response tokens."""
    generator = torch.Generator().manual_seed(seed)
    a, e = (torch.randn(rollouts.loss_mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return a * rollouts.loss_mask, 0.3 * e * rollouts.loss_mask


def assert_update(result: DeltaH1Result, setup: Setup, rollouts: Rollouts, a: Tensor, e: Tensor | None) -> None:
    """A result of the score function whose update is Σ a ∇s + e ∇H of the whole batch."""
    x = prompt_gradients(*setup, rollouts, "dr_grpo").x
    B = len(x)
    kernel = cross_kernel(x, B * prompt_gradients_of(setup[0], rollouts, a, e) * preconditioner(*setup))
    close(result.delta_h1, (kernel.sum() - kernel.trace()) / (B * (B - 1)))
    close(result.row_sums, kernel.sum(1))
    close(result.column_sums, kernel.sum(0))


@pytest.mark.parametrize("how", ["by sequence", "by token", "with entropies"])
@pytest.mark.parametrize("engine", ENGINES)
def test_coefficients(setups: dict[str, Setup], engine: str, how: str) -> None:
    family, options = ENGINES[engine]
    setup, rollouts = setups[family], batch()
    a, e = tables(rollouts)
    if how == "by sequence":
        by_sequence = a.sum(1)
        result = forecast(setup, rollouts, coefficients=by_sequence, **options)
        assert_update(result, setup, rollouts, by_sequence[:, None] * rollouts.loss_mask, None)
    elif how == "by token":
        assert_update(forecast(setup, rollouts, coefficients=a, **options), setup, rollouts, a, None)
    else:
        assert_update(forecast(setup, rollouts, coefficients=(a, e), **options), setup, rollouts, a, e)


def a_loss(rollouts: Rollouts) -> Any:
    """One that couples rows, with a ratio, a bonus and a statistic of the batch."""
    mask = rollouts.loss_mask.double()
    advantages = rollouts.advantages[:, None]

    def loss(s: Tensor, h: Tensor) -> Tensor:
        ratio = (0.3 * (s + 2.0)).exp()
        surprising = (h * mask).sum() / mask.sum()
        by_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) - 0.1 * h * surprising
        return (by_token * mask).sum() / mask.sum()

    return loss


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss(setups: dict[str, Setup], engine: str) -> None:
    family, options = ENGINES[engine]
    setup, rollouts = setups[family], batch()
    calls: list[tuple[torch.Size, torch.dtype]] = []
    loss = a_loss(rollouts)

    def counted(s: Tensor, h: Tensor) -> Tensor:
        calls.append((s.shape, s.dtype))
        return loss(s, h)

    result = forecast(setup, rollouts, update=counted, **options)
    assert calls == [(rollouts.loss_mask.shape, torch.float64)]
    leaves = [t.detach().requires_grad_() for t in token_values(setup[0], rollouts)]
    a, e = (-g for g in torch.autograd.grad(loss(*leaves), leaves))
    assert bool((e != 0).any())
    assert_update(result, setup, rollouts, a, e)
    known = TokenScores(*(t.detach() for t in leaves))
    close(forecast(setup, rollouts, update=loss, scores=known, **options).delta_h1, result.delta_h1)


def test_memory_that_runs_out_in_the_one_forward_that_was_to_say_everything(
    setups: dict[str, Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch goes through in parts then, and scores have to be found first."""
    setup, rollouts = setups["qwen2"], batch()
    expected = forecast(setup, rollouts, update=a_loss(rollouts), engine="one_pass")
    whole, calls = PackedWay._backward_through_row, []

    def limited(self: PackedWay, layout: Any, *arguments: Any, **named: Any) -> None:
        calls.append(len(layout.groups))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole(self, layout, *arguments, **named)

    monkeypatch.setattr(PackedWay, "_backward_through_row", limited)
    found = forecast(setup, rollouts, update=a_loss(rollouts), engine="one_pass")
    assert calls[:2] == [5, 5]
    assert max(calls[2:]) < 5
    close(found.delta_h1, expected.delta_h1)
    close(found.row_sums, expected.row_sums)


@pytest.mark.parametrize("engine", ["two_pass", "one_pass", "jvp"])
def test_a_loss_of_another_batch(setups: dict[str, Setup], engine: str) -> None:
    setup, entropy, update = setups["qwen2"], batch(1), batch(2)
    loss = a_loss(update)
    result = forecast(setup, update, entropy, update=loss, engine=engine)
    leaves = [t.detach().requires_grad_() for t in token_values(setup[0], update)]
    a, e = (-g for g in torch.autograd.grad(loss(*leaves), leaves))
    step = prompt_gradients_of(setup[0], update, a, e).sum(0) * preconditioner(*setup)
    projections = prompt_gradients(*setup, entropy, "dr_grpo").x @ step
    close(result.delta_h1, projections.mean())
    close(result.std_error, projections.std() / math.sqrt(len(projections)))


def test_a_loss_that_is_the_described_one_gives_its_number(setups: dict[str, Setup]) -> None:
    setup, rollouts = setups["qwen2"], make_rollouts(Shape(sizes=(3, 3, 3), budget=2), models.VOCABULARY, 3)
    mask = rollouts.loss_mask.double()

    def dapo(s: Tensor, _: Tensor) -> Tensor:
        return -(s * rollouts.advantages[:, None] * mask).sum() / mask.sum()

    close(
        forecast(setup, rollouts, update=dapo).delta_h1,
        forecast(setup, rollouts, update_weighting="pooled").delta_h1,
    )


CANDIDATES = {
    "negatives": candidates.reweighted(positive=0.0),
    "bonus": candidates.entropy_bonus(0.05),
    "covariant": candidates.clip_cov(share=0.2, low=-10.0, high=10.0),
}


@pytest.mark.parametrize("estimator", ["score_function", "rao_blackwell"])
@pytest.mark.parametrize("engine", ENGINES)
def test_candidates_are_forecast_as_if_each_were_the_update(
    setups: dict[str, Setup], engine: str, estimator: str
) -> None:
    family, options = ENGINES[engine]
    setup, rollouts = setups[family], batch()
    numbers = {"reward": torch.randn(rollouts.n_sequences, dtype=torch.float64)}
    loss, coefficients = a_loss(rollouts), tables(rollouts)
    options = {**options, "entropy_estimator": estimator, "functionals": numbers}
    result = forecast(setup, rollouts, updates={"loss": loss, "given": coefficients, **CANDIDATES}, **options)
    plain = forecast(setup, rollouts, **options)
    close(result.delta_h1, plain.delta_h1)
    assert list(result.updates) == ["loss", "given", *CANDIDATES]
    for name, more in (("loss", {"update": loss}), ("given", {"coefficients": coefficients})):
        alone, found = forecast(setup, rollouts, **options, **more), result.updates[name]
        for ours, theirs in (
            (found.forecast, alone.forecast),
            (found.functionals["reward"], alone.functionals["reward"]),
        ):
            close(ours.value, theirs.value)
            close(ours.std_error, theirs.std_error)
            close(ours.by_unit, theirs.by_unit)
        if estimator == "rao_blackwell":
            assert found.split is not None and alone.split is not None
            close(found.split.direct.value, alone.split.direct.value)
            close(found.split.on_batch, alone.split.on_batch)


def test_what_ready_candidates_are(setups: dict[str, Setup]) -> None:
    """Each against coefficients that are worked out here."""
    setup, rollouts = setups["tiny"], batch()
    mask = rollouts.loss_mask.double()
    s = token_values(setup[0], rollouts)[0].detach()
    advantages = rollouts.advantages[:, None] * mask
    groups = rollouts.group_ids.tolist()
    kept = [int(n) > 0 for n in rollouts.loss_mask.sum(1)]
    size = torch.tensor([sum(k and h == g for h, k in zip(groups, kept, strict=True)) for g in groups]).double()
    order = list(dict.fromkeys(groups))
    budget = torch.tensor([int(rollouts.max_lengths[order.index(g)]) for g in groups]).double()  # type: ignore[index]
    B = len(order)
    w = (1 / budget / size / B)[:, None] * mask
    covariance = (advantages - advantages.sum() / mask.sum()) * (s - s.sum() / mask.sum())
    within = (covariance.abs() < 0.4) & (mask == 1)
    n_within, n_tokens = int(within.sum()), int(mask.sum())
    assert 0 < n_within < n_tokens
    expected = {
        "negatives": (w * advantages.clamp_max(0.0), None),
        "w-reinforce": (w * torch.where(advantages > 0, 0.1 * advantages, advantages), None),
        "bonus": (w * advantages, 0.05 * w),
        "covariant": (w * advantages * ~within, None),
    }
    result = forecast(
        setup,
        rollouts,
        updates={
            "negatives": candidates.reweighted(positive=0.0),
            "w-reinforce": candidates.reweighted(positive=0.1),
            "bonus": candidates.entropy_bonus(0.05),
            "covariant": candidates.clip_cov(share=1.0, low=-0.4, high=0.4),
        },
    )
    for name, (a, e) in expected.items():
        x = prompt_gradients(*setup, rollouts, "dr_grpo").x
        kernel = cross_kernel(x, B * prompt_gradients_of(setup[0], rollouts, a, e) * preconditioner(*setup))
        close(result.updates[name].forecast.value, (kernel.sum() - kernel.trace()) / (B * (B - 1)))


def test_candidates_that_need_the_sampler_s_log_probs(setups: dict[str, Setup]) -> None:
    import dataclasses

    setup, rollouts = setups["tiny"], batch()
    for candidate in (candidates.kl_cov(), candidates.clip_higher()):
        with pytest.raises(RolloutsError, match="old_logprobs"):
            forecast(setup, rollouts, updates={"it": candidate})
    s = token_values(setup[0], rollouts)[0].detach()
    moved = dataclasses.replace(rollouts, old_logprobs=(s - 0.3).clamp_max(0.0))
    result = forecast(
        setup, moved, updates={"kl": candidates.kl_cov(0.5), "higher": candidates.clip_higher(0.01, 0.01)}
    )
    clipped = forecast(setup, moved, importance_ratio="token", clip_range=(0.01, 0.01))
    close(result.updates["higher"].forecast.value, clipped.delta_h1)
    assert abs(result.updates["kl"].forecast.value - result.delta_h1) > 1e-6 * abs(result.delta_h1)


def test_refusals(setups: dict[str, Setup]) -> None:
    setup, rollouts = setups["tiny"], batch()
    with pytest.raises(ConfigError, match="both give the update"):
        forecast(setup, rollouts, update=a_loss(rollouts), coefficients=torch.zeros(1))
    with pytest.raises(ConfigError, match="expected a function"):
        forecast(setup, rollouts, update=torch.zeros(rollouts.n_sequences))
    with pytest.raises(ConfigError, match="'update' is no name"):
        forecast(setup, rollouts, updates={"update": candidates.entropy_bonus(0.1)})
    with pytest.raises(ConfigError, match="changes options that describe the update"):
        forecast(setup, rollouts, update=a_loss(rollouts), updates={"x": candidates.clip_higher()})
    s, h = (t.detach() for t in token_values(setup[0], rollouts))
    with pytest.raises(RolloutsError, match="nats a token away from the model's"):
        forecast(setup, rollouts, update=a_loss(rollouts), scores=TokenScores(1.1 * s, h))
    with pytest.raises(ConfigError, match="`entropies` has shape"):
        forecast(setup, rollouts, update=a_loss(rollouts), scores=TokenScores(s, h[:, 1:]))


def test_weights_by_token_are_in_whatever_is_made_of_the_update(setups: dict[str, Setup]) -> None:
    """Advantages by token of both signs: in candidates, and in a step that is taken to score it again."""
    from entropy_fast.truth import measure_delta_h

    setup, plain = setups["tiny"], batch()
    by_token = tables(plain, 5)[0]
    fields = {
        name: getattr(plain, name) for name in ("input_ids", "attention_mask", "loss_mask", "group_ids", "max_lengths")
    }
    rollouts = Rollouts(**fields, advantages=by_token, temperature=1.0, top_p=1.0)
    options = {"entropy_estimator": "rao_blackwell", "engine": "one_pass"}
    same, reversed_ = candidates.reweighted(), candidates.reweighted(positive=0.0)
    result = forecast(setup, rollouts, updates={"same": same, "negatives": reversed_}, **options)
    close(result.updates["same"].forecast.value, result.delta_h1)
    negatives = Rollouts(**fields, advantages=by_token.clamp_max(0.0), temperature=1.0, top_p=1.0)
    close(result.updates["negatives"].forecast.value, forecast(setup, negatives, **options).delta_h1)
    estimate = options_of(entropy_estimator="rao_blackwell")["estimate"]
    found = measure_delta_h(*setup, rollouts, etas=[1e-3], estimate=estimate)
    assert result.split is not None
    close(found.points[0].symmetric.direct, 1e-3 * found.learning_rate * result.split.on_batch, 1e-5)


def test_a_candidate_leaves_a_kl_term_alone(setups: dict[str, Setup]) -> None:
    import dataclasses

    setup, rollouts = setups["tiny"], batch()
    s = token_values(setup[0], rollouts)[0].detach()
    rollouts = dataclasses.replace(rollouts, ref_logprobs=(s - 0.2).clamp_max(0.0))
    result = forecast(setup, rollouts, kl_coefficient=0.3, updates={"none": candidates.reweighted(0.0, 0.0)})
    assert rollouts.advantages is not None
    nothing = dataclasses.replace(rollouts, advantages=torch.zeros_like(rollouts.advantages))
    close(result.updates["none"].forecast.value, forecast(setup, nothing, kl_coefficient=0.3).delta_h1)


@pytest.mark.parametrize("engine", ["two_pass", "packed", "in parts"])
def test_a_loss_sees_the_model_as_its_caller_left_it(setups: dict[str, Setup], engine: str) -> None:
    family, options = ENGINES[engine]
    setup, rollouts = setups[family], batch()
    loss, seen = a_loss(rollouts), []

    def looking(s: Tensor, h: Tensor) -> Tensor:
        seen.append((setup[0].training, torch.is_autocast_enabled("cpu")))
        return loss(s, h)

    updates = {"half": candidates.reweighted(positive=0.5), "bonus": candidates.entropy_bonus(0.01)}
    forecast(setup, rollouts, update=looking, updates=updates, autocast_dtype="bfloat16", **options)
    assert seen == [(True, False)]
    assert setup[0].training


def test_scores_of_other_tokens_are_not_taken(setups: dict[str, Setup]) -> None:
    setup, rollouts = setups["tiny"], batch()
    s, h = (t.detach() for t in token_values(setup[0], rollouts))
    turned = s.clone()
    for row in range(len(s)):
        places = rollouts.loss_mask[row] == 1
        turned[row, places] = s[row, places].flip(0)
    for given, what in ((TokenScores(turned, h), "log-probs"), (TokenScores(s, 0.5 * h), "entropies")):
        with pytest.raises(RolloutsError, match=f"scores: the {what} of row"):
            forecast(setup, rollouts, update=a_loss(rollouts), scores=given)


def test_components_are_for_any_number_of_batches(setups: dict[str, Setup]) -> None:
    from entropy_fast import EstimateOptions, ProbeComponents
    from entropy_fast.step import AdamState

    model, optimizer = setups["tiny"]
    state = AdamState.from_optimizer(optimizer, model)
    used, first, second = ProbeComponents(model, state, EstimateOptions()), batch(1), batch(2)
    used.accumulate_sum_X(first.without_empty_responses()[0])
    again, fresh = (
        components.accumulate_sum_X(second.without_empty_responses()[0])
        for components in (used, ProbeComponents(model, state, EstimateOptions()))
    )
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, fresh.tensors, strict=True))
