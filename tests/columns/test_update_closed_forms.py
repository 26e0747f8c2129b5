"""Updates in closed form against the gradient of the loss that they stand for, by autograd over log-probs and entropies.

Legend: s_t log-prob, H_t entropy, r ratio to the sampler's policy, A advantage, w length weight, G responses of a prompt.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_fast import EstimateOptions, Rollouts
from entropy_fast.columns import TokenScores, columns_of
from entropy_fast.columns.given import coefficients_of_loss, given_update
from entropy_fast.columns.update import PolicyGradient
from entropy_fast.errors import ConfigError, RolloutsError

SIZES = (2, 3, 2)
T = 7


def batch(seed: int, *, token_weights: bool = False, moved: float = 0.4) -> tuple[Rollouts, TokenScores]:
    """Three prompts, responses of 1 to 5 tokens behind a prompt of two, and what a policy says of them."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.full((size,), n) for n, size in enumerate(SIZES)])
    lengths = torch.randint(1, 6, (len(groups),), generator=generator)
    columns = torch.arange(T)
    loss = ((columns >= 2) & (columns < 2 + lengths[:, None])).long()
    s, h, old, ref = (
        torch.where(loss == 1, -sign * torch.rand(loss.shape, generator=generator, dtype=torch.float64) * 2, 0.0)
        for sign in (1, -1, 1, 1)
    )
    old = torch.where(loss == 1, (s + moved * torch.randn(loss.shape, generator=generator)).clamp_max(0.0), 0.0)
    rollouts = Rollouts(
        input_ids=groups[:, None].expand(-1, T) + 1,
        attention_mask=(columns < 2 + lengths[:, None]).long(),
        loss_mask=loss,
        group_ids=groups,
        advantages=torch.randn(len(groups), generator=generator, dtype=torch.float64),
        max_lengths=torch.tensor([6, 8, 7]),
        old_logprobs=old,
        ref_logprobs=ref,
        token_weights=torch.randn(loss.shape, generator=generator, dtype=torch.float64) if token_weights else None,
    )
    return rollouts, TokenScores(s, h)


def loss_of(rollouts: Rollouts, options: dict[str, Any]) -> Any:
    """The loss of the whole batch as a trainer writes it."""
    mask = rollouts.loss_mask.double()
    lengths = mask.sum(1)
    size = torch.tensor([SIZES[g] for g in rollouts.group_ids.tolist()], dtype=torch.float64)
    weight = {
        "dr_grpo": 1 / torch.tensor([(6, 8, 7)[g] for g in rollouts.group_ids.tolist()], dtype=torch.float64),
        "per_token": 1 / lengths,
        "sequence": torch.ones_like(lengths),
        # Every token alike: what divides the mean over prompts of means over responses comes out again.
        "pooled": len(SIZES) * size / lengths.sum(),
    }[options.get("update_weighting") or "dr_grpo"]

    def loss(s: Tensor, h: Tensor) -> Tensor:
        log_ratio = (s - rollouts.old_logprobs) * mask
        if options.get("importance_ratio") == "sequence":
            log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(s)
        ratio = log_ratio.exp() if options.get("importance_ratio", "none") != "none" else (s - s.detach()).exp()
        advantage = rollouts.advantages[:, None]
        if rollouts.token_weights is not None:
            advantage = advantage * rollouts.token_weights
        surrogate = ratio * advantage
        if options.get("clip_range"):
            low, high = options["clip_range"]
            surrogate = torch.minimum(surrogate, ratio.clamp(1 - low, 1 + high) * advantage)
        if options.get("dual_clip"):
            surrogate = torch.where(
                advantage < 0, torch.maximum(surrogate, options["dual_clip"] * advantage), surrogate
            )
        d = s - rollouts.ref_logprobs
        kl = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[options.get("kl_estimator", "k3")]
        by_token = -surrogate + options.get("kl_coefficient", 0.0) * kl - options.get("entropy_bonus", 0.0) * h
        return (weight[:, None] * by_token * mask / size[:, None]).sum() / len(SIZES)

    return loss


def assert_closed_form(rollouts: Rollouts, scores: TokenScores, options: dict[str, Any]) -> None:
    estimate = EstimateOptions(entropy_estimator="rao_blackwell", **options)
    column = PolicyGradient(estimate, rollouts.token_weights is not None)
    own = column.weigh(scores.of_all(rollouts))
    everything = torch.arange(rollouts.n_sequences)
    a, e = coefficients_of_loss(
        loss_of(rollouts, options), scores, everything, tuple(rollouts.loss_mask.shape), rollouts
    )
    mask = rollouts.loss_mask == 1
    sequence = mask.nonzero()[:, 0]
    found = own.by_sequence[sequence] if own.of_logprob is None else own.of_logprob
    assert column.by_token == (own.of_logprob is not None)
    torch.testing.assert_close(found / len(SIZES), a[mask], rtol=1e-10, atol=1e-13)
    bonus = torch.zeros_like(found) if own.of_entropy is None else own.of_entropy
    torch.testing.assert_close(bonus / len(SIZES), e[mask], rtol=1e-10, atol=1e-13)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    weighting=st.sampled_from(["dr_grpo", "per_token", "sequence", "pooled"]),
    ratio=st.sampled_from(["none", "token", "sequence"]),
    clip=st.sampled_from([None, (0.2, 0.2), (0.1, 0.4)]),
    dual=st.sampled_from([None, 1.3]),
    kl=st.sampled_from([0.0, 0.3]),
    kind=st.sampled_from(["k1", "k2", "k3"]),
    bonus=st.sampled_from([0.0, 0.05]),
    weighted=st.booleans(),
)
def test_every_combination(
    seed: int,
    weighting: str,
    ratio: str,
    clip: tuple[float, float] | None,
    dual: float | None,
    kl: float,
    kind: str,
    bonus: float,
    weighted: bool,
) -> None:
    rollouts, scores = batch(seed, token_weights=weighted)
    options: dict[str, Any] = {"update_weighting": weighting, "kl_estimator": kind, "kl_coefficient": kl}
    options |= {"entropy_bonus": bonus, "importance_ratio": ratio}
    if ratio != "none":
        options |= {"clip_range": clip, "dual_clip": dual}
    assert_closed_form(rollouts, scores, options)


def test_something_is_clipped_both_ways() -> None:
    """Otherwise the comparison above would not tell."""
    rollouts, scores = batch(3)
    for ratio in ("token", "sequence"):
        plain, clipped, dual = (
            PolicyGradient(EstimateOptions(importance_ratio=ratio, **more)).weigh(scores.of_all(rollouts)).by_sequence
            for more in ({}, {"clip_range": (0.05, 0.05)}, {"dual_clip": 1.01})
        )
        assert bool((plain != clipped).any())
        assert bool((plain != dual).any())


def test_advantages_by_token_are_weights_by_token() -> None:
    rollouts, scores = batch(5)
    by_token = torch.randn(rollouts.loss_mask.shape, dtype=torch.float64)
    fields = {name: getattr(rollouts, name) for name in ("input_ids", "attention_mask", "loss_mask", "group_ids")}
    given = Rollouts(**fields, advantages=by_token, max_lengths=rollouts.max_lengths)
    found = PolicyGradient(EstimateOptions(update_weighting="sequence"), True).weigh(scores.of_all(given))
    mask = rollouts.loss_mask == 1
    size = torch.tensor([SIZES[g] for g in rollouts.group_ids.tolist()], dtype=torch.float64)
    expected = (by_token / size[:, None])[mask]
    torch.testing.assert_close(found.of_logprob, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs"])
def test_what_is_missing_is_named(field: str) -> None:
    rollouts, scores = batch(1)
    kept = {
        name: getattr(rollouts, name)
        for name in ("input_ids", "attention_mask", "loss_mask", "group_ids", "advantages")
    }
    option = {"importance_ratio": "sequence"} if field == "old_logprobs" else {"kl_coefficient": 0.1}
    with pytest.raises(RolloutsError, match=f"needs the update batch's `{field}`"):
        PolicyGradient(EstimateOptions(**option)).weigh(scores.of_all(Rollouts(**kept)))


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (lambda s, h: s, "a tensor of shape"),
        (lambda s, h: float(s.sum()), "a float"),
        (lambda s, h: s.sum().detach(), "without a graph"),
        (lambda s, h: s.sum() * math.nan, "not finite"),
        (lambda s, h: s.exp().sum(), "where no response token stands"),
        (lambda s, h: (h + 1).sum(), "entropies where no response token stands"),
    ],
)
def test_a_loss_that_cannot_be_meant(loss: Any, problem: str) -> None:
    rollouts, scores = batch(2)
    with pytest.raises(ConfigError, match=problem):
        coefficients_of_loss(loss, scores, torch.arange(7), (7, T), rollouts)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("text", "neither a loss function nor coefficients"),
        (torch.zeros(3), r"shape \[3\]"),
        (torch.full((7, T), math.nan), "not finite"),
        ((torch.zeros(7), torch.zeros(7)), r"expected \[7, 7\]"),
    ],
)
def test_coefficients_that_cannot_be_meant(given: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        given_update(given, batch(2)[0])


def test_options_that_describe_an_update_are_refused_beside_one_that_is_given() -> None:
    from entropy_fast.columns import Wanted

    rollouts, _ = batch(2)
    for option in ({"kl_coefficient": 0.1}, {"update_weighting": "sequence"}, {"importance_ratio": "token"}):
        with pytest.raises(ConfigError, match="describe an update, and `update` gives one"):
            columns_of(EstimateOptions(**option), Wanted(update=lambda s, h: s.sum()), rollouts, rollouts)
