"""Several live optimizers as one: the step of all, and nothing of them changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from entropy_fast import EstimateOptions
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import next_step_of, preconditioner_of, read_optimizer
from entropy_fast.step.joined import JoinedOptimizer, kind_name


def model_and_pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = nn.Sequential(nn.Linear(3, 5, dtype=dtype), nn.Linear(5, 3, dtype=dtype))
    matrices, vectors = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    return model, [
        torch.optim.Muon(matrices, lr=1e-2),
        torch.optim.AdamW([{"params": vectors[:1], "lr": 3e-3}, {"params": vectors[1:]}], lr=1e-3, weight_decay=0.1),
    ]


def fill(model: nn.Module, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("wrap", [list, tuple])
def test_the_step_is_that_of_all_and_nothing_changes(steps: int, wrap: Callable[[Any], Any]) -> None:
    model, pair = model_and_pair()
    for step in range(steps):
        fill(model, step)
        for one in pair:
            one.step()
    gradients = fill(model, 9)
    kept = copy.deepcopy([model.state_dict(), *(one.state_dict() for one in pair)])
    at_hand = read_optimizer(wrap(pair), model, any_kind=True)
    registry = ParameterRegistry.build(model, at_hand.state.group_of)
    estimate = EstimateOptions(step="next")
    step = next_step_of(at_hand, registry, preconditioner_of(at_hand, registry, estimate, next_step=True), estimate)
    found, exactly = step.of(gradients), step.exactly(gradients)
    assert str(kept) == str([model.state_dict(), *(one.state_dict() for one in pair)])
    before = [p.detach().clone() for p in model.parameters()]
    for one in pair:
        one.step()
    for parts, moved, p, was in zip(found, exactly, model.parameters(), before, strict=True):
        assert parts is not None and moved is not None
        real = p.detach() - was
        assert torch.equal(moved, real)
        assert (sum(parts.values(), torch.zeros(())) - real).norm() <= 1e-11 * real.norm()
    assert [group.learning_rate for group in at_hand.state.groups] == [1e-2, 3e-3, 1e-3]
    assert set(at_hand.state.group_of.values()) == {0, 1, 2}


def test_a_rate_that_a_scheduler_sets_is_the_one_that_is_read() -> None:
    model, pair = model_and_pair()
    for group in pair[1].param_groups:
        group["lr"] = 7e-5
    groups = read_optimizer(pair, model, any_kind=True).state.groups
    assert [group.learning_rate for group in groups] == [1e-2, 7e-5, 7e-5]


def test_one_parameter_in_two_is_refused() -> None:
    model, pair = model_and_pair()
    with pytest.raises(OptimizerStateError, match="1 of them held twice"):
        JoinedOptimizer([*pair, torch.optim.SGD(list(model.parameters())[:1], lr=0.1)])
    with pytest.raises(OptimizerStateError, match="0 optimizers"):
        read_optimizer([], model, any_kind=True)


def test_adams_geometry_is_refused_by_the_names_of_all() -> None:
    model, pair = model_and_pair()
    assert kind_name(JoinedOptimizer(pair)) == "torch.optim.Muon beside torch.optim.adamw.AdamW"
    with pytest.raises(
        OptimizerStateError, match=r"is a torch\.optim\.Muon beside torch\.optim\.adamw\.AdamW; the geometry"
    ):
        read_optimizer(pair, model, any_kind=False)
