"""What is left of a gradient without one unit's own part."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from entropy_fast.engines.along import SeenGradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_not_left_and_what_others_have_is(dtype: torch.dtype) -> None:
    prompts, eps = 4, torch.finfo(dtype).eps
    own = torch.linspace(0.1, 3.0, 50, dtype=dtype)
    # The first half of the elements is this unit's alone, summed in another order; the rest has a thousandth of others'.
    alone = torch.arange(50) < 25
    noise = torch.linspace(-8, 8, 50, dtype=dtype) * eps
    others = torch.where(alone, 0.0, 1e-3 * own)
    loss = -(own * (1 + noise) + others) / prompts
    seen = SeenGradient(cast(Any, None), [loss], [loss], -1.0, prompts, 1.0)
    left = seen.without(0, own.unsqueeze(0), torch.tensor([1]))[0]
    assert bool((left[alone] == 0).all())
    expected = -others / (prompts - 1)
    assert torch.allclose(left[~alone], expected[~alone], rtol=20 * eps * 1e3, atol=0)


def test_in_16_bits_not_everything_is_rounding() -> None:
    own = torch.ones(4, dtype=torch.bfloat16)
    loss = -(own + torch.tensor([0.0, 0.004, 0.1, -1.0], dtype=torch.bfloat16)) / 2
    seen = SeenGradient(cast(Any, None), [loss], [loss], -1.0, 2, 1.0)
    left = seen.without(0, own.unsqueeze(0), torch.tensor([1]))[0]
    assert (left == 0).tolist() == [True, True, False, False]


def test_what_cancels_rounds_as_its_summands_do() -> None:
    """An element that is small because its summands cancel is no better known than they are."""
    eps = torch.finfo(torch.float32).eps
    own = torch.tensor([[1.0, 1e-3, 1e-3, -2.0]])
    others = torch.tensor([[0.0, 0.0, 1e-4, 0.0]])
    loss = -(own + others + torch.tensor([[0.0, 20 * eps, 0.0, 0.0]])) / 2
    seen = SeenGradient(cast(Any, None), [loss], [loss], -1.0, 2, 1.0)
    left = seen.without(0, own.unsqueeze(0), torch.tensor([1]))[0]
    assert (left == 0).tolist() == [[True, True, False, True]]
    assert float(left[0, 2]) == pytest.approx(-1e-4, rel=1e-2)
