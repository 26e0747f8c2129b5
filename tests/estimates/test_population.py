"""What X̄ and X̄·Ȳ are, summed over every tuple of responses of a policy that can be enumerated.

Legend: H entropy of a response, S = log p(y), w length weight, L its length, G responses per prompt, X̄ and Ȳ the means of
X_n and Y_n over prompts and G-tuples of responses.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from probe_oracle.oracle import relative_error
from probe_oracle.toy_policy import ToyPolicy
from torch import Tensor

from entropy_fast.columns import ScoredTokens, columns_of
from entropy_fast.config import EstimateOptions, Weighting
from entropy_fast.rollouts import Rollouts

BUDGET = 5  # a generation budget above the longest response
SETTINGS = [
    (ToyPolicy(seed=1), 2),
    (ToyPolicy(limit=2, prompts=3, seed=2), 3),
    (ToyPolicy(vocabulary=4, limit=2, seed=3), 2),
]


def enumerated(
    policy: ToyPolicy, prompt: int, group_size: int, **fields: Any
) -> tuple[Rollouts, Tensor, Tensor, Tensor]:
    """One group for every G-tuple of responses: rollouts, probability of each tuple, and S and ∇S of every row."""
    tuples = list(itertools.product(range(len(policy.responses)), repeat=group_size))
    drawn = torch.tensor(tuples)
    width = 1 + policy.limit
    ids = torch.zeros(len(policy.responses), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    mask[:, 0] = 1
    for row, response in enumerate(policy.responses):
        ids[row, 1 : 1 + len(response)] = torch.tensor(response)
        mask[row, 1 : 1 + len(response)] = 1
    loss = mask.clone()
    loss[:, 0] = 0
    flat = drawn.reshape(-1)
    rollouts = Rollouts(
        input_ids=ids[flat],
        attention_mask=mask[flat],
        loss_mask=loss[flat],
        group_ids=torch.arange(len(tuples)).repeat_interleave(group_size),
        rewards=policy.rewards[prompt][flat],
        **fields,
    )
    logprobs = policy.logprob_table[prompt]
    return rollouts, logprobs[drawn].sum(-1).exp(), logprobs[flat], policy.scores[prompt][flat]


def expectations(policy: ToyPolicy, group_size: int, weighting: Weighting, **fields: Any) -> tuple[Tensor, Tensor]:
    """X̄ and ḡ = E g_n over all prompts and all tuples, with the package's coefficients."""
    x, g = torch.zeros_like(policy.theta), torch.zeros_like(policy.theta)
    for prompt in range(policy.prompts):
        rollouts, probability, logprobs, scores = enumerated(policy, prompt, group_size, **fields)
        assert math.isclose(float(probability.sum()), 1, rel_tol=1e-12)
        rows = torch.arange(rollouts.n_sequences)
        # Of tokens these columns ask for nothing but that their log-probs are finite.
        tokens = torch.zeros(int(rollouts.response_lengths.sum()), dtype=torch.float64)
        scored = ScoredTokens(rollouts, rows, logprobs, tokens, None)
        entropy, update = (
            columns_of(EstimateOptions(weighting=weighting, entropy_estimator="score_function"))
            .weigh(scored)
            .by_sequence
        )
        per_row = probability.repeat_interleave(group_size) / policy.prompts
        x += (per_row * entropy) @ scores
        g += (per_row * update) @ scores
    return x, g


def central_difference(function: Any, theta: Tensor, step: float = 1e-5) -> Tensor:
    slopes = []
    for index in range(len(theta)):
        shift = torch.zeros_like(theta)
        shift[index] = step
        slopes.append((function(theta + shift) - function(theta - shift)) / (2 * step))
    return torch.stack(slopes)


def weight_of(policy: ToyPolicy, weighting: Weighting) -> Tensor:
    """[R] w of every response when the budget is given."""
    lengths = policy.lengths
    return {
        "sequence": torch.ones_like(lengths),
        "per_token": 1 / lengths,
        "dr_grpo": torch.full_like(lengths, 1 / BUDGET),
    }[weighting]


@pytest.mark.parametrize(("policy", "group_size"), SETTINGS)
@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo", "per_token"])
def test_mean_x_is_the_gradient_of_the_stated_functional(
    policy: ToyPolicy, group_size: int, weighting: Weighting
) -> None:
    x, _ = expectations(policy, group_size, weighting, max_lengths=BUDGET)
    weight = weight_of(policy, weighting)
    surrogate = central_difference(lambda theta: policy.expected_surrogate(theta, weight), policy.theta)
    entropy = central_difference(lambda theta: policy.expected_weighted_entropy(theta, weight), policy.theta)
    assert relative_error(x, surrogate) < 1e-6
    if weighting == "per_token":
        # w depends on the response, so E[w] moves with θ: X̄ is not the gradient of the entropy per token.
        assert relative_error(x, entropy) > 0.05
    else:
        assert relative_error(x, entropy) < 1e-6


def test_sequence_entropy_is_minus_sum_p_log_p() -> None:
    """The functional of the test above, by an own sum over tokens: H = Σ_t E H(next token | prefix)."""
    policy = ToyPolicy(seed=1)
    total = 0.0
    for prompt in range(policy.prompts):
        probability = policy.logprob_table[prompt].exp().tolist()
        for length in range(policy.limit):
            prefixes: dict[tuple[int, ...], dict[int, float]] = {}
            for response, p in zip(policy.responses, probability, strict=True):
                if len(response) > length:
                    following = prefixes.setdefault(response[:length], {})
                    following[response[length]] = following.get(response[length], 0.0) + p
            for following in prefixes.values():
                mass = sum(following.values())
                total -= sum(p * math.log(p / mass) for p in following.values())
    found = policy.expected_weighted_entropy(policy.theta, torch.ones(len(policy.responses)).double())
    assert math.isclose(float(found), total / policy.prompts, rel_tol=1e-12)


@pytest.mark.parametrize(("policy", "group_size"), SETTINGS)
@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo", "per_token"])
def test_rate_times_mean_x_times_mean_y_is_the_first_order_change(
    policy: ToyPolicy, group_size: int, weighting: Weighting
) -> None:
    learning_rate = 0.03
    generator = torch.Generator().manual_seed(0)
    precondition = 0.5 + torch.rand(len(policy.theta), generator=generator, dtype=torch.float64)
    x, g = expectations(policy, group_size, weighting, max_lengths=BUDGET)
    y = precondition * g
    weight = weight_of(policy, weighting)

    def functional(t: float) -> float:
        return float(policy.expected_surrogate(policy.theta + t * learning_rate * y, weight))

    step = 1e-3
    # Richardson's combination of two central differences: the error is of order step^4.
    wide, narrow = ((functional(h) - functional(-h)) / (2 * h) for h in (2 * step, step))
    change = (4 * narrow - wide) / 3
    assert math.isclose(learning_rate * float(x @ y), change, rel_tol=1e-6)


@pytest.mark.parametrize(("policy", "group_size"), SETTINGS)
@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo", "per_token"])
def test_closed_forms_that_simulations_use_agree_with_the_enumeration(
    policy: ToyPolicy, group_size: int, weighting: Weighting
) -> None:
    x, g = expectations(policy, group_size, weighting, max_lengths=BUDGET)
    closed = policy.population(weight_of(policy, weighting), group_size, torch.ones_like(policy.theta))
    assert relative_error(closed[0], x) < 1e-12
    assert relative_error(closed[1], g) < 1e-12


@pytest.mark.parametrize(
    ("policy", "group_size"),
    [(ToyPolicy(seed=1), 2), (ToyPolicy(vocabulary=2, seed=4), 3), (ToyPolicy(vocabulary=2, seed=5), 4)],
)
def test_the_longest_sampled_response_as_budget_biases_x_and_a_given_budget_does_not(
    policy: ToyPolicy, group_size: int
) -> None:
    lengths = policy.lengths
    probability = policy.logprob_table.exp()
    sampled, _ = expectations(policy, group_size, "dr_grpo")
    # What the mean would be if 1/L_max were independent of the responses: its mean, prompt by prompt, times the gradient.
    independent = torch.zeros_like(policy.theta)
    for prompt in range(policy.prompts):
        mean = 0.0
        for drawn in itertools.product(range(len(lengths)), repeat=group_size):
            mean += math.prod(float(probability[prompt, r]) for r in drawn) / float(max(lengths[r] for r in drawn))
        gradient = -(probability[prompt] * policy.logprob_table[prompt]) @ policy.scores[prompt]
        independent += mean * gradient / policy.prompts
    assert relative_error(sampled, independent) > 0.01
    # Nor is it the gradient with any other constant: the nearest multiple of it leaves something over.
    entropy = central_difference(
        lambda theta: policy.expected_weighted_entropy(theta, torch.ones_like(lengths)), policy.theta
    )
    nearest = float(sampled @ entropy) / float(entropy @ entropy)
    assert relative_error(nearest * entropy, sampled) > 1e-3  # finite differences are good to 1e-8
    given, _ = expectations(policy, group_size, "dr_grpo", max_lengths=BUDGET)
    assert relative_error(given, entropy / BUDGET) < 1e-6


def test_the_bias_of_the_longest_sampled_response_shrinks_with_the_group() -> None:
    policy = ToyPolicy(vocabulary=2, limit=3, prompts=1, seed=4)
    given, _ = expectations(policy, 2, "dr_grpo", max_lengths=policy.limit)
    errors = [relative_error(expectations(policy, size, "dr_grpo")[0], given) for size in (2, 3, 5)]
    assert errors[0] > errors[1] > errors[2] > 0.001
