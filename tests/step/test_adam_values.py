"""Impossible numbers of an optimizer are refused where they are read, live and from a file, in every group."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entropy_fast.errors import LearningRateError, OptimizerStateError
from entropy_fast.step import AdamState, adam_state_from_file

SMALLEST_NORMAL = 2.2250738585072014e-308


def two_groups(**options: Any) -> tuple[nn.Module, torch.optim.AdamW]:
    """A stepped optimizer; what is wrong is put into its second group or into the last parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def read(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path | None) -> AdamState:
    if folder is None:
        return AdamState.from_optimizer(optimizer, model)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return adam_state_from_file(folder / "optimizer.pt", model)


@pytest.fixture(params=["live", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where to write the file; None for the live optimizer."""
    return tmp_path if request.param == "file" else None


@pytest.mark.parametrize("rate", [-1e-3, -5e-324, math.nan, math.inf, -math.inf, 5e-324, SMALLEST_NORMAL / 2])
def test_learning_rates_of_every_group(folder: Path | None, rate: float) -> None:
    model, optimizer = two_groups()
    optimizer.param_groups[1]["lr"] = rate
    with pytest.raises(LearningRateError, match=r"learning rate: the optimizer's group 1 has "):
        read(optimizer, model, folder)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("numpy", np.float64(2e-3)),
        ("a numpy integer", np.int64(1)),
        ("a tensor", torch.tensor(2e-3, dtype=torch.float64)),
        ("a tensor of shape [1]", torch.tensor([2e-3], dtype=torch.float64)),
        ("an integer", 1),
        ("the smallest normal number", SMALLEST_NORMAL),
        ("a scheduler's last step", 0),
    ],
)
def test_numbers_in_other_forms(form: str, value: Any) -> None:
    model, optimizer = two_groups()
    optimizer.param_groups[1].update(lr=value, eps=value, betas=(0.9, torch.tensor(0.5)))
    group = AdamState.from_optimizer(optimizer, model).groups[1]
    assert (group.learning_rate, group.eps, group.beta2) == (float(value), float(value), 0.5)
    assert all(type(number) is float for number in (group.learning_rate, group.eps, group.beta2))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", True, "lr True"),
        ("lr", "1e-3", "lr '1e-3'"),
        ("lr", None, "lr None"),
        ("lr", 10**400, "lr an integer of 1329 bits"),
        ("lr", torch.ones(2), r"lr a tensor of shape \[2\]"),
        ("lr", torch.tensor(True), "lr a tensor of"),
        ("lr", torch.tensor(1j), "lr a tensor of"),
        ("eps", 1j, "eps 1j"),
        ("eps", [1e-8], r"eps \[1e-08\]"),
        ("eps", -1e-8, "ε = -1e-08"),
        ("eps", math.nan, "ε = nan"),
        ("eps", math.inf, "ε = inf"),
        ("betas", 0.9, "betas 0.9"),
        ("betas", (0.9,), r"betas \[0\.9\]"),
        ("betas", (0.9, 0.99, 0.999), r"betas \[0\.9, 0\.99, 0\.999\]"),
        ("betas", (0.9, "x" * 9999), r"betas \[0\.9, 'x{80}\.\.\.'\]"),
        ("betas", (0.9, 1.0), r"β2 = 1\.0"),
        ("betas", (0.9, 1.5), r"β2 = 1\.5"),
        ("betas", (0.9, -0.1), r"β2 = -0\.1"),
        ("betas", (0.9, math.nan), "β2 = nan"),
        ("amsgrad", "yes", "amsgrad 'yes'"),
        ("amsgrad", torch.ones(2), r"amsgrad a tensor of shape \[2\]"),
        ("maximize", 3, "maximize 3"),
        ("maximize", math.nan, "maximize nan"),
    ],
)
def test_hyperparameters_of_every_group(folder: Path | None, key: str, value: Any, message: str) -> None:
    model, optimizer = two_groups()
    optimizer.param_groups[1][key] = value
    with pytest.raises(OptimizerStateError, match=f"parameter group 1 has .*{message}"):
        read(optimizer, model, folder)


def damaged(moment: torch.Tensor, value: float) -> torch.Tensor:
    moment = moment.clone()
    moment.view(-1)[1] = value
    return moment


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1e-12, "1 negative second moments and 0 second"),
        (-math.inf, "1 negative second moments and 1 second"),
        (math.nan, "0 negative second moments and 1 second"),
        (math.inf, "0 negative second moments and 1 second"),
    ],
)
def test_second_moments_are_means_of_squares(folder: Path | None, amsgrad: bool, value: float, message: str) -> None:
    model, optimizer = two_groups(amsgrad=amsgrad)
    entry = optimizer.state[list(model.parameters())[-1]]
    key = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
    entry[key] = damaged(entry[key], value)
    with pytest.raises(OptimizerStateError, match=rf"'1\.bias' has {message}"):
        read(optimizer, model, folder)


@pytest.mark.parametrize(
    "moment",
    [
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        3.0,
    ],
    ids=["integers", "complex", "sparse", "meta", "float8", "number"],
)
def test_moments_that_hold_no_readable_values(moment: Any) -> None:
    model, optimizer = two_groups()
    optimizer.state[list(model.parameters())[-1]]["exp_avg_sq"] = moment
    with pytest.raises(OptimizerStateError, match=r"'1\.bias' has keys .* a tensor of floating-point values"):
        read(optimizer, model, None)


@pytest.mark.parametrize("step", [0, -1, 0.5, 2.5, math.nan, math.inf, torch.tensor(0.0)])
def test_steps_are_counts_from_one(folder: Path | None, step: Any) -> None:
    model, optimizer = two_groups()
    optimizer.state[list(model.parameters())[-1]]["step"] = step
    with pytest.raises(OptimizerStateError, match=r"'1\.bias' has step .*; a whole number of at least 1"):
        read(optimizer, model, folder)


@pytest.mark.parametrize("step", [True, "3", 10**400, None, [1], torch.tensor(1j), torch.ones(1, device="meta")])
def test_steps_that_are_no_numbers(step: Any) -> None:
    model, optimizer = two_groups()
    optimizer.state[list(model.parameters())[-1]]["step"] = step
    with pytest.raises(OptimizerStateError, match=r"'1\.bias' has keys .*'step', .* a number"):
        read(optimizer, model, None)


def test_second_moments_that_are_all_zero(folder: Path | None) -> None:
    model, optimizer = two_groups()
    for entry in optimizer.state.values():
        entry["exp_avg_sq"].zero_()
    with pytest.raises(OptimizerStateError, match="all second moments of the 4 parameters that were stepped are 0"):
        read(optimizer, model, folder)
    optimizer.state[model[0].bias]["exp_avg_sq"][2] = 1e-20  # some elements may well be untouched
    assert len(read(optimizer, model, folder).moments) == 4


def test_maximize_in_all_groups_is_noted_and_leaves_the_state_as_it_is(folder: Path | None) -> None:
    """Ascending J or descending -J: the same second moments, and the same step."""
    model, descending = two_groups()
    other, ascending = two_groups(maximize=True)
    expected, found = read(descending, model, folder), read(ascending, other, folder)
    assert all(group.maximize for group in found.groups)
    assert [torch.equal(found.moments[n].second_moment, m.second_moment) for n, m in expected.moments.items()] == [
        True
    ] * 4
    (note,) = set(found.notes) - set(expected.notes)
    assert "maximize=True" in note
    assert "other sign" in note


def test_maximize_in_some_groups_is_refused(folder: Path | None) -> None:
    model, optimizer = two_groups()
    optimizer.param_groups[1]["maximize"] = True
    with pytest.raises(OptimizerStateError, match=r"parameter groups \[1\] have maximize=True and the others do not"):
        read(optimizer, model, folder)


def test_what_maximize_does_in_torch() -> None:
    """The ground of the rule: maximize on J is the step of no maximize on -J."""
    steps = []
    for maximize, sign in ((True, 1.0), (False, -1.0)):
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=0.1, maximize=maximize, weight_decay=0.0)
        (sign * (weight * torch.tensor([1.0, -2.0, 3.0])).sum()).backward()
        optimizer.step()
        steps.append(weight.detach())
    assert torch.equal(*steps)
    assert steps[0].sign().tolist() == [1.0, -1.0, 1.0]  # uphill
