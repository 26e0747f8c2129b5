"""Every functional of a policy that can be enumerated: the mean of X_n over all tuples of responses is its gradient.

Legend: p(y) probability of a response, s_t log-prob and H_t entropy of its token t, m_t 1 where it counts, w length weight, L
length, G responses per prompt, R = E[Σ m H] / E[Σ m], F any number of a response. Gradients are held against central
differences of sums over all responses, those that ran into the limit without an end among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from probe_oracle.oracle import relative_error
from probe_oracle.toy_policy import ToyPolicy
from torch import Tensor

from entropy_fast.columns import ScoredTokens
from entropy_fast.columns.column import Column
from entropy_fast.columns.entropy import DirectEntropy, EntropyMeasure, RaoBlackwellEntropy, ScoreFunctionEntropy
from entropy_fast.columns.functional import SequenceFunctional
from entropy_fast.config import Weighting
from entropy_fast.rollouts import Rollouts

BUDGET = 5
STEP = 1e-5
# Responses of every prompt, by the policy's limit; groups of three where there are few different responses.
SIZES = {3: (2, 2, 2, 2), 2: (2, 3, 2)}
POLICIES = [ToyPolicy(seed=1), ToyPolicy(limit=2, prompts=3, seed=2)]
WEIGHTINGS: tuple[Weighting, ...] = ("sequence", "dr_grpo", "per_token", "pooled")


def token_gradients(policy: ToyPolicy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s and H [P, R, limit], and their gradients [P, R, limit, D]."""
    gradients = torch.autograd.functional.jacobian(policy.token_values, policy.theta, vectorize=True)
    s, h, ds, dh = (t.detach() for t in (*policy.token_values(policy.theta), *gradients))
    return s, h, ds, dh


def mask_of(policy: ToyPolicy, kind: str) -> Tensor:
    """[R, limit] m_t of every response: all of its tokens, or its first and third alone."""
    columns = torch.arange(policy.limit)
    exists = columns < policy.lengths[:, None]
    return (exists & (columns % 2 == 0) if kind == "every other" else exists).double()


def pooled_ratio(policy: ToyPolicy, theta: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """E[Σ m H] and E[Σ m], mean over prompts."""
    s, h = policy.token_values(theta)
    probability = s.sum(-1).exp()
    return (probability * (h * mask).sum(-1)).sum(-1).mean(), (probability * mask.sum(-1)).sum(-1).mean()


def functional(policy: ToyPolicy, theta: Tensor, weighting: Weighting, mask: Tensor) -> Tensor:
    """E[w Σ m H], or R."""
    total, length = pooled_ratio(policy, theta, mask)
    if weighting == "pooled":
        return total / length
    counted = mask.sum(-1)
    weight = {
        "sequence": torch.ones_like(counted),
        "dr_grpo": torch.full_like(counted, 1 / BUDGET),
        "per_token": torch.where(counted > 0, 1 / counted.clamp_min(1), 0.0),
    }[weighting]
    s, h = policy.token_values(theta)
    return (s.sum(-1).exp() * weight * (h * mask).sum(-1)).sum(-1).mean()


def differences(value: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """[D] central differences."""
    rows = []
    for index in range(len(theta)):
        moved = [theta.clone() for _ in range(2)]
        moved[0][index] += STEP
        moved[1][index] -= STEP
        rows.append((value(moved[0]) - value(moved[1])) / (2 * STEP))
    return torch.stack(rows)


def mean_x(policy: ToyPolicy, make: Callable[[Tensor, Tensor, int], Column], mask: Tensor) -> Tensor:
    """E X_n over all tuples of responses, mean over prompts. ``make`` gets mask rows [n, T], responses, and the prompt."""
    s, h, ds, dh = token_gradients(policy)
    total = torch.zeros_like(policy.theta)
    columns = torch.arange(1 + policy.limit)
    for prompt in range(policy.prompts):
        size = SIZES[policy.limit][prompt]
        drawn = torch.tensor(list(itertools.product(range(len(policy.responses)), repeat=size)))
        flat = drawn.flatten()
        lengths = policy.lengths.long()[flat]
        rollouts = Rollouts(
            input_ids=torch.zeros(len(flat), len(columns), dtype=torch.int64),
            attention_mask=(columns <= lengths[:, None]).long(),
            loss_mask=((columns >= 1) & (columns <= lengths[:, None])).long(),
            group_ids=torch.arange(len(drawn)).repeat_interleave(size),
            rewards=policy.rewards[prompt][flat],
            max_lengths=BUDGET,
        )
        exists = rollouts.loss_mask[:, 1:] == 1
        own_s, own_h = s[prompt][flat], h[prompt][flat]
        scored = ScoredTokens(rollouts, torch.arange(len(flat)), own_s.sum(1), own_s[exists], own_h[exists])
        counted = torch.nn.functional.pad(mask[flat], (1, 0))
        weights = make(counted, flat, prompt).weigh(scored)
        sequence = torch.arange(len(flat)).repeat_interleave(lengths)
        parts = torch.zeros(len(sequence), len(policy.theta), dtype=torch.float64)
        if weights.of_entropy is not None:
            parts += weights.of_entropy[:, None] * dh[prompt][flat][exists]
        if weights.of_logprob is not None:
            parts += weights.of_logprob[:, None] * ds[prompt][flat][exists]
        elif weights.of_entropy is None:
            parts += weights.by_sequence[sequence][:, None] * ds[prompt][flat][exists]
        of_rows = torch.zeros(len(flat), parts.shape[1], dtype=torch.float64).index_add_(0, sequence, parts)
        probability = policy.logprob_table[prompt][drawn].sum(1).exp()
        x = probability @ of_rows.view(len(drawn), size, -1).sum(1)
        if getattr(getattr(make(counted, flat, prompt), "measure", None), "weighting", "") == "pooled":
            # The weight there is one over the lengths of these tuples; here it is one over the expected length.
            x = x * counted.sum() / (len(drawn) * size)
        total += x / policy.prompts
    return total


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", ["all", "every other"])
def test_the_entropy(policy: ToyPolicy, weighting: Weighting, kind: str) -> None:
    mask = mask_of(policy, kind)
    total, length = (float(t) for t in pooled_ratio(policy, policy.theta, mask))
    offset = total / length if weighting == "pooled" else 0.0

    def column(counted: Tensor, _: Tensor, __: int) -> Column:
        return RaoBlackwellEntropy(EntropyMeasure(weighting, None if kind == "all" else counted, offset))

    expected = differences(lambda theta: functional(policy, theta, weighting, mask), policy.theta)
    found = mean_x(policy, column, mask) / (length if weighting == "pooled" else 1.0)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_its_direct_part(policy: ToyPolicy, weighting: Weighting) -> None:
    """How distributions change at prefixes that are visited as often as before."""
    mask = mask_of(policy, "all")
    length = float(pooled_ratio(policy, policy.theta, mask)[1])
    probability = policy.logprob_table.exp()
    weight = {
        "sequence": torch.ones_like(policy.lengths),
        "dr_grpo": torch.full_like(policy.lengths, 1 / BUDGET),
        "per_token": 1 / policy.lengths,
        "pooled": torch.full_like(policy.lengths, 1 / length),
    }[weighting]

    def visited(theta: Tensor) -> Tensor:
        return (probability * weight * policy.token_values(theta)[1].sum(-1)).sum(-1).mean()

    found = mean_x(policy, lambda *_: DirectEntropy(EntropyMeasure(weighting)), mask)
    found = found / (length if weighting == "pooled" else 1.0)
    assert relative_error(found, differences(visited, policy.theta)) < 1e-6


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mean_over_all_tokens_from_log_probs(policy: ToyPolicy) -> None:
    mask = mask_of(policy, "all")
    total, length = (float(t) for t in pooled_ratio(policy, policy.theta, mask))
    found = (
        mean_x(policy, lambda *_: ScoreFunctionEntropy(EntropyMeasure("pooled", None, total / length)), mask) / length
    )
    expected = differences(lambda theta: functional(policy, theta, "pooled", mask), policy.theta)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["reward", "length"])
def test_other_numbers(policy: ToyPolicy, name: str) -> None:
    numbers = policy.rewards if name == "reward" else policy.lengths.expand(policy.prompts, -1)

    def column(_: Tensor, flat: Tensor, prompt: int) -> Column:
        return SequenceFunctional(name, numbers[prompt][flat])

    def expectation(theta: Tensor) -> Tensor:
        return (policy.logprobs(theta).exp() * numbers).sum(-1).mean()

    found = mean_x(policy, column, mask_of(policy, "all"))
    assert relative_error(found, differences(expectation, policy.theta)) < 1e-6
