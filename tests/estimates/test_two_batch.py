"""The two-batch estimate by loops over a kernel between entropy prompts and update prompts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_oracle.u_statistics import standard_error

from entropy_fast.estimates import two_batch_estimate


@settings(max_examples=60, deadline=None)
@given(b_entropy=st.integers(1, 6), b_update=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_against_loops_over_the_kernel(b_entropy: int, b_update: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(b_entropy, b_update, generator=generator, dtype=torch.float64)
    found = two_batch_estimate(float(kernel.sum()), kernel.sum(1), kernel.sum(0))
    s = [math.fsum(kernel[n].tolist()) / b_update for n in range(b_entropy)]
    t = [math.fsum(kernel[:, m].tolist()) / b_entropy for m in range(b_update)]
    assert found.value == pytest.approx(math.fsum(s) / b_entropy, rel=1e-9, abs=1e-12)
    assert found.projections.tolist() == pytest.approx(s, rel=1e-9, abs=1e-12)
    assert found.update_projections.tolist() == pytest.approx(t, rel=1e-9, abs=1e-12)
    v_x = standard_error(s) ** 2 if b_entropy > 1 else None
    v_y = standard_error(t) ** 2 if b_update > 1 else None
    assert found.v_x == (None if v_x is None else pytest.approx(v_x, rel=1e-9))
    assert found.v_y == (None if v_y is None else pytest.approx(v_y, rel=1e-9))
    assert found.se_conditional == (None if v_x is None else pytest.approx(math.sqrt(v_x), rel=1e-9))
    total = None if v_x is None or v_y is None else math.sqrt(v_x + v_y)
    assert found.se_total == (None if total is None else pytest.approx(total, rel=1e-9))


def test_numbers_worked_out_by_hand() -> None:
    kernel = torch.tensor([[1.0, 3.0], [5.0, 7.0], [0.0, 2.0]])
    found = two_batch_estimate(float(kernel.sum()), kernel.sum(1), kernel.sum(0))
    assert found.value == pytest.approx(3.0)
    assert found.projections.tolist() == pytest.approx([2, 6, 1])
    assert found.update_projections.tolist() == pytest.approx([2, 4])
    assert found.v_x == pytest.approx((1 + 9 + 4) / 2 / 3)
    assert found.v_y == pytest.approx((1 + 1) / 1 / 2)
    assert found.se_total == pytest.approx(math.sqrt(7 / 3 + 1))


def test_the_error_given_the_update_needs_no_second_update_prompt() -> None:
    found = two_batch_estimate(6.0, torch.tensor([1.0, 5.0]), torch.tensor([6.0]))
    assert found.se_conditional == pytest.approx(2.0)
    assert (found.v_y, found.se_total) == (None, None)
    unknown = two_batch_estimate(6.0, torch.tensor([1.0, 5.0]), None, n_update=2)
    assert (unknown.value, unknown.projections.tolist()) == (1.5, [0.5, 2.5])
    assert unknown.se_conditional == pytest.approx(1.0)
    assert (unknown.update_projections, unknown.v_y, unknown.se_total) == (None, None, None)
