"""The Rao-Blackwell entropy gradient, summed over every tuple of responses of a policy that can be enumerated.

Legend: H_t entropy of the distribution that token t is drawn from, w length weight, L length, G responses per prompt,
X_n = Σ_i Σ_t (c_t ∇s_t + e_t ∇H_t) over the responses of a prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from probe_oracle.oracle import relative_error
from probe_oracle.toy_policy import ToyPolicy
from torch import Tensor

from entropy_fast.columns import ScoredTokens, Side, columns_of
from entropy_fast.config import EntropyEstimator, EstimateOptions, Weighting
from entropy_fast.rollouts import Rollouts

BUDGET = 5  # above the longest response
SETTINGS = [
    (ToyPolicy(seed=1), 2),
    (ToyPolicy(limit=2, prompts=3, seed=2), 3),
    (ToyPolicy(vocabulary=4, limit=2, seed=3), 1),
]


@dataclasses.dataclass(frozen=True)
class TokenValues:
    """s and H of every token [P, R, limit], and their gradients [P, R, limit, D]."""

    logprobs: Tensor
    entropies: Tensor
    of_logprobs: Tensor
    of_entropies: Tensor


@cache
def values_of(policy: ToyPolicy) -> TokenValues:
    gradients = torch.autograd.functional.jacobian(policy.token_values, policy.theta, vectorize=True)
    return TokenValues(*(t.detach() for t in (*policy.token_values(policy.theta), *gradients)))


def every_x(
    policy: ToyPolicy, prompt: int, group_size: int, estimator: EntropyEstimator, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """Probability [tuples] and X_n [tuples, D] of every G-tuple of responses to a prompt, with the package's coefficients."""
    values = values_of(policy)
    drawn = torch.tensor(list(itertools.product(range(len(policy.responses)), repeat=group_size)))
    flat = drawn.flatten()
    lengths = policy.lengths.long()[flat]
    columns = torch.arange(1 + policy.limit)
    rollouts = Rollouts(
        input_ids=torch.zeros(len(flat), len(columns), dtype=torch.int64),
        attention_mask=(columns <= lengths[:, None]).long(),
        loss_mask=((columns >= 1) & (columns <= lengths[:, None])).long(),
        group_ids=torch.arange(len(drawn)).repeat_interleave(group_size),
        rewards=policy.rewards[prompt][flat],
        max_lengths=BUDGET,
    )
    exists = rollouts.loss_mask[:, 1:] == 1
    s, h = (table[prompt][flat] for table in (values.logprobs, values.entropies))
    options = EstimateOptions(entropy_estimator=estimator, weighting=weighting, baseline="responses")
    scored = ScoredTokens(rollouts, torch.arange(len(flat)), s.sum(1), s[exists], h[exists])
    coefficients = columns_of(options).of_side(Side.FUNCTIONAL).weigh(scored)
    sequence = torch.arange(len(flat)).repeat_interleave(lengths)
    own = coefficients.columns[0]
    of_logprob = own.by_sequence[sequence] if own.of_logprob is None else own.of_logprob
    parts = of_logprob[:, None] * values.of_logprobs[prompt][flat][exists]
    if own.of_entropy is not None:
        parts = parts + own.of_entropy[:, None] * values.of_entropies[prompt][flat][exists]
    of_rows = torch.zeros(len(flat), parts.shape[1], dtype=torch.float64).index_add_(0, sequence, parts)
    return policy.logprob_table[prompt][drawn].sum(1).exp(), of_rows.view(len(drawn), group_size, -1).sum(1)


def mean_x(policy: ToyPolicy, group_size: int, weighting: Weighting) -> Tensor:
    total = torch.zeros_like(policy.theta)
    for prompt in range(policy.prompts):
        probability, x = every_x(policy, prompt, group_size, "rao_blackwell", weighting)
        total += probability @ x / policy.prompts
    return total


def functional(policy: ToyPolicy, theta: Tensor, weighting: Weighting) -> Tensor:
    """E[w Σ_t H_t], mean over prompts."""
    weight = {
        "sequence": torch.ones_like(policy.lengths),
        "per_token": 1 / policy.lengths,
        "dr_grpo": torch.full_like(policy.lengths, 1 / BUDGET),
    }[weighting]
    logprobs, entropies = policy.token_values(theta)
    return (logprobs.sum(-1).exp() * weight * entropies.sum(-1)).sum(-1).mean()


@pytest.mark.parametrize(("policy", "group_size"), SETTINGS)
@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo", "per_token"])
def test_mean_x_is_the_gradient_of_the_stated_functional(
    policy: ToyPolicy, group_size: int, weighting: Weighting
) -> None:
    theta = policy.theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(functional(policy, theta, weighting), theta)
    assert relative_error(mean_x(policy, group_size, weighting), expected) < 1e-12


@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo"])
def test_the_functional_is_the_sequence_entropy(weighting: Weighting) -> None:
    """Σ_t E H_t is -E S: what the score function's estimate is of, too, where weights are constants."""
    policy, _ = SETTINGS[0]
    weight = torch.full_like(policy.lengths, 1.0 if weighting == "sequence" else 1 / BUDGET)
    expected = policy.expected_weighted_entropy(policy.theta, weight)
    torch.testing.assert_close(functional(policy, policy.theta, weighting), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("policy", "group_size"), SETTINGS[:2])
@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo"])
def test_its_variance_is_smaller_than_the_score_function_s(
    policy: ToyPolicy, group_size: int, weighting: Weighting
) -> None:
    for prompt in range(policy.prompts):
        spread = {}
        for estimator in ("score_function", "rao_blackwell"):
            probability, x = every_x(policy, prompt, group_size, estimator, weighting)
            spread[estimator] = float(probability @ (x - probability @ x).square().sum(1))
        assert spread["rao_blackwell"] < 0.5 * spread["score_function"]
