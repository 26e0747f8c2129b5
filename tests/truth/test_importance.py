"""Importance weights on responses from before a step: exact to first order on a policy whose samples can all be listed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_fast.truth import reweighted
from entropy_fast.truth.importance import pareto_k

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # of three responses
LENGTHS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
SLOPE = torch.tensor([0.3, -0.5, 0.0], dtype=torch.float64)  # of log-probs along a step
VALUES, VALUE_SLOPE = torch.tensor([0.4, 1.1, 2.0]).double(), torch.tensor([0.2, -0.1, 0.5]).double()


def moved(eta: float) -> tuple[Tensor, Tensor]:
    """Log-probs and values of the three responses after a step."""
    return torch.log_softmax(P.log() + eta * SLOPE, 0), VALUES + eta * VALUE_SLOPE


def expected_change(eta: float, *, ratio: bool) -> float:
    logprobs, values = moved(eta)
    if not ratio:
        return float(logprobs.exp() @ values - P @ VALUES)
    return float(logprobs.exp() @ values / (logprobs.exp() @ LENGTHS) - P @ VALUES / (P @ LENGTHS))


@pytest.mark.parametrize("size", [2, 3])
def test_on_average_over_all_samples_it_is_the_change_to_first_order(size: int) -> None:
    eta, mean = 1e-5, 0.0
    logprobs, values = moved(eta)
    for drawn in itertools.product(range(3), repeat=size):
        rows = torch.tensor(drawn)
        found = reweighted(torch.zeros(size).long(), (logprobs - P.log())[rows], VALUES[rows], values[rows])
        mean += float(P[rows].prod()) * found.total
        assert found.direct == pytest.approx(float((values - VALUES)[rows].mean()), abs=1e-15)
    assert mean == pytest.approx(expected_change(eta, ratio=False), rel=1e-4)


def test_a_large_sample_has_the_change_of_a_mean_and_of_a_ratio() -> None:
    rows = torch.multinomial(P, 40_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(5000, 8)
    prompt, rows = torch.arange(5000).repeat_interleave(8), rows.flatten()
    logprobs, values = moved(0.3)
    for lengths in (None, LENGTHS[rows]):
        found = reweighted(prompt, (logprobs - P.log())[rows], VALUES[rows], values[rows], lengths)
        truth = expected_change(0.3, ratio=lengths is not None)
        assert abs(found.total - truth) < 4 * found.total_std_error
        assert found.total_std_error < 0.05 * abs(truth)
        assert 0.9 < found.ess < 1


@given(st.integers(2, 6), st.integers(2, 5), st.integers(0, 10**6), st.booleans())
@settings(max_examples=50)
def test_its_parts_are_what_they_are_called(prompts: int, size: int, seed: int, ratio: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after, weights = torch.randn(3, prompts * size, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (prompts * size,), generator=generator).double()
    prompt = torch.arange(prompts).repeat_interleave(size)
    found = reweighted(prompt, weights, before, after, lengths if ratio else None)
    rows = [np.arange(n * size, (n + 1) * size) for n in range(prompts)]

    def change(chosen: list[np.ndarray]) -> float:
        new = new_length = old = old_length = 0.0
        for own in chosen:
            w = np.exp(weights.numpy()[own])
            w /= w.sum()
            b, a, k = before.numpy()[own], after.numpy()[own], lengths.numpy()[own] if ratio else np.ones(size)
            old, old_length = old + b.mean(), old_length + k.mean()
            new += a.mean() + size / (size - 1) * (w @ a - a.mean())
            new_length += k.mean() + size / (size - 1) * (w @ k - k.mean())
        return float(new / new_length - old / old_length)

    assert found.total == pytest.approx(change(rows), rel=1e-9, abs=1e-12)
    kept = [change([*rows[:n], *rows[n + 1 :]]) for n in range(prompts)]
    spread = math.sqrt((prompts - 1) / prompts * sum((k - np.mean(kept)) ** 2 for k in kept))
    assert found.total_std_error == pytest.approx(spread, rel=1e-7, abs=1e-12)


def test_what_is_not_known_is_nan() -> None:
    one = reweighted(torch.zeros(3).long(), torch.zeros(3).double(), VALUES, VALUES)
    assert math.isnan(one.total_std_error) and one.total == 0 and one.ess == 1 and math.isnan(one.pareto_k)
    alone = reweighted(torch.arange(3), torch.zeros(3).double(), VALUES, VALUES)
    assert math.isnan(alone.total)  # one response a prompt says nothing of visits
    heavy = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert pareto_k(0.01 * heavy) < 0.5 < 0.7 < pareto_k(4 * heavy)
