"""The baseline from other prompts: by numpy's least squares, without bias for any batch, the same by every engine."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_options import options_of
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from probe_oracle.oracle import cross_kernel, preconditioner, relative_error
from probe_oracle.token_gradients import groups_of, prompt_gradients_of, token_values
from probe_oracle.toy_policy import ToyPolicy
from torch import Tensor

from entropy_fast import Rollouts, fast_delta_h1
from entropy_fast.columns import TokenScores
from entropy_fast.columns.baselines import of_other_prompts
from entropy_fast.columns.entropy import BatchEntropy, EntropyMeasure, RaoBlackwellEntropy
from entropy_fast.columns.tokens import TokenPlaces


def by_least_squares(to_come: Tensor, entropies: Tensor, places: TokenPlaces) -> Tensor:
    """[M] b_t, prompt by prompt: the penalty as rows below those of the tokens."""
    position, own = places.column.numpy().astype(float), entropies.numpy()

    def features(chosen: np.ndarray, most_h: float = np.inf, most_t: float = np.inf) -> np.ndarray:
        h, t = np.minimum(own[chosen], most_h), np.minimum(position[chosen], most_t)
        return np.stack([np.ones(len(h)), h, t, t**2], 1)

    prompt, found = places.prompt[places.sequence].numpy(), np.zeros(len(to_come))
    counts = np.bincount(prompt)
    for n in np.unique(prompt):
        others = prompt != n
        weights = 1 / np.sqrt(counts[prompt[others]])[:, None]
        rows = weights * features(others)
        penalty = np.diag(np.sqrt(1e-3 * (rows**2).sum(0)))
        targets = np.concatenate([weights[:, 0] * to_come.numpy()[others], np.zeros(4)])
        beta = np.linalg.lstsq(np.concatenate([rows, penalty]), targets, rcond=None)[0]
        found[~others] = features(~others, own[others].max(), position[others].max()) @ beta
    return torch.from_numpy(found)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=2, max_size=4),
    seed=st.integers(0, 999),
)
def test_it_is_the_regression_that_it_says(lengths: list[list[int]], seed: int) -> None:
    flat = [length for group in lengths for length in group]
    places = TokenPlaces(
        torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat)),
        torch.cat([torch.arange(length) for length in flat]),
        torch.tensor([n for n, group in enumerate(lengths) for _ in group]),
        max(flat),
    )
    generator = torch.Generator().manual_seed(seed)
    to_come, entropies = (torch.rand(len(places.sequence), generator=generator, dtype=torch.float64) for _ in range(2))
    expected = by_least_squares(to_come, entropies, places)
    torch.testing.assert_close(of_other_prompts(to_come, entropies, places), expected, rtol=1e-7, atol=1e-9)


def test_nothing_is_made_up_beyond_what_the_other_prompts_have() -> None:
    """Responses of 200 tokens beside those of 8: a parabola through the first 8 would be anything at 200."""
    lengths = [8] * 4 + [200] * 4
    places = TokenPlaces(
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.arange(len(lengths)) // 4,
        200,
    )
    generator = torch.Generator().manual_seed(0)
    to_come = torch.cat([length - 1.0 - torch.arange(length) for length in lengths]).double()
    to_come += torch.randn(len(to_come), generator=generator, dtype=torch.float64)
    b = of_other_prompts(to_come, torch.rand(len(to_come), generator=generator, dtype=torch.float64), places)
    long = places.sequence >= 4
    assert float(b[long].abs().max()) < 20
    assert float((to_come - b)[long].square().mean()) < 1.1 * float(to_come[long].square().mean())


def test_one_prompt_has_none() -> None:
    places = TokenPlaces(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 0]), 2)
    assert of_other_prompts(torch.ones(3).double(), torch.ones(3).double(), places).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("weighting", ["sequence", "dr_grpo", "per_token"])
def test_it_leaves_no_bias_whatever_the_other_prompts_drew(weighting: Any) -> None:
    """The mean of X_n over all of a prompt's own tuples, the others' responses held fixed, is its gradient."""
    policy, size = ToyPolicy(limit=2, prompts=3, seed=2), 2
    gradients = torch.autograd.functional.jacobian(policy.token_values, policy.theta, vectorize=True)
    s, h, ds, dh = (t.detach() for t in (*policy.token_values(policy.theta), *gradients))
    columns, fixed = torch.arange(1 + policy.limit), [(1, 4), (2, 5)]
    x = torch.zeros_like(policy.theta)
    for drawn in itertools.product(range(len(policy.responses)), repeat=size):
        response = torch.tensor([*drawn, *fixed[0], *fixed[1]])
        prompt = torch.tensor([0, 0, 1, 1, 2, 2])
        lengths = policy.lengths.long()[response]
        rollouts = Rollouts(
            input_ids=prompt[:, None].expand(-1, len(columns)),
            attention_mask=(columns <= lengths[:, None]).long(),
            loss_mask=((columns >= 1) & (columns <= lengths[:, None])).long(),
            group_ids=prompt,
            rewards=torch.zeros(6),
            max_lengths=5,
        )
        scores = TokenScores(*(torch.nn.functional.pad(t[prompt, response], (1, 0)) for t in (s, h)))
        column = BatchEntropy(RaoBlackwellEntropy(EntropyMeasure(weighting)), fitted=True).resolved(scores, rollouts)
        found = column.weigh(scores.of_all(rollouts))
        own = rollouts.loss_mask[:, 1:] == 1
        mine = torch.repeat_interleave(prompt, lengths) == 0
        parts = (
            found.of_logprob[:, None] * ds[prompt, response][own]
            + found.of_entropy[:, None] * dh[prompt, response][own]
        )
        x += policy.logprob_table[0][list(drawn)].sum().exp() * parts[mine].sum(0)

    def functional(theta: Tensor) -> Tensor:
        logprobs, entropies = policy.token_values(theta)
        weight = {"sequence": 1.0, "dr_grpo": 0.2, "per_token": 1 / policy.lengths}[weighting]
        return (logprobs[0].sum(-1).exp() * weight * entropies[0].sum(-1)).sum()

    theta = policy.theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(functional(theta), theta)
    assert relative_error(x, expected) < 1e-12


@pytest.mark.filterwarnings("ignore:.*without response tokens were left out")
@pytest.mark.parametrize(
    "options", [{"engine": "two_pass"}, {"engine": "one_pass"}, {"engine": "one_pass", "prompts_per_microbatch": 1}]
)
def test_every_engine_takes_the_same(options: dict[str, Any]) -> None:
    model = models.tiny_transformer().train()
    optimizer = models.stepped_adam(model)
    rollouts = make_rollouts(Shape(budget=2, empty=1), models.VOCABULARY, 4)
    h = token_values(model, rollouts)[1].detach()
    groups = groups_of(rollouts)
    order = list(dict.fromkeys(rollouts.group_ids.tolist()))
    rows = [row for members in groups for row in members]
    lengths = [int(rollouts.loss_mask[row].sum()) for row in rows]
    places = TokenPlaces(
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor([n for n, members in enumerate(groups) for _ in members]),
        max(lengths),
    )
    mask = rollouts.loss_mask == 1
    w = {row: 1 / float(rollouts.max_lengths[order.index(int(rollouts.group_ids[row]))]) for row in rows}  # type: ignore[index]
    values = [h[row][mask[row]] for row in rows]
    to_come = torch.cat([w[row] * (v.sum() - v.cumsum(0)) for row, v in zip(rows, values, strict=True)])
    b = by_least_squares(to_come, torch.cat(values), places)
    c, e, a = (torch.zeros_like(h) for _ in range(3))
    at = 0
    for row, length, members in zip(rows, lengths, [m for m in groups for _ in m], strict=True):
        c[row, mask[row]] = (to_come[at : at + length] - b[at : at + length]) / len(members)
        e[row, mask[row]] = w[row] / len(members)
        a[row, mask[row]] = rollouts.advantages[row] * w[row] / len(members)  # type: ignore[index]
        at += length
    y = prompt_gradients_of(model, rollouts, a, None) * preconditioner(model, optimizer)
    kernel = cross_kernel(prompt_gradients_of(model, rollouts, c, e), y)
    chosen = options_of(entropy_estimator="rao_blackwell", baseline="prompts", learning_rate=1.0, **options)
    result = fast_delta_h1(model, optimizer, rollouts, **chosen)
    B = len(kernel)
    assert relative_error(result.row_sums, kernel.sum(1)) < 1e-8
    assert relative_error(result.delta_h1, (kernel.sum() - kernel.trace()) / (B * (B - 1))) < 1e-8
