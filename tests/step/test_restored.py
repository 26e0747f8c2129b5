"""Optimizers other than Adam from files of their own: the next step against the one that the live optimizer takes.

Parameters of one shape are in groups in another order than the model's, so that reading by order shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from entropy_fast import EstimateOptions
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import LearningRateError, OptimizerStateError
from entropy_fast.step import (
    NextStep,
    adam_state_from_file,
    next_step_of,
    optimizer_from_file,
    preconditioner_of,
    read_optimizer,
)
from entropy_fast.step.joined import JoinedOptimizer

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (4, 3), "b.bias": (4,), "c.weight": (4, 3), "c.bias": (4,)}
Optimizers = list[torch.optim.Optimizer]


class Model(nn.Module):
    """Three layers of one shape."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for name in "abc":
            self.add_module(name, nn.Linear(3, 4, dtype=dtype))
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))


def named(model: nn.Module, *ends: str) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that end so, the last first."""
    return [(name, p) for name, p in reversed(list(model.named_parameters())) if name.endswith(ends)]


def two_groups(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    late = named(model, "c.weight", "c.bias", "b.weight")
    return [{"params": late}, {"params": named(model, "a.weight", "a.bias", "b.bias"), "lr": 3e-4, **second}]


def transformers_adafactor(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    options = {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1, **options}
    return Adafactor(two_groups(model), **options)


def muon(model: nn.Module, *ends: str, **options: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = torch.optim.Muon(named(model, *ends), **{"lr": 1e-2, "weight_decay": 0.1, **options})
    return found


def adamw(model: nn.Module, *ends: str, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named(model, *ends), **{"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1, **options})


def sgd(model: nn.Module, *ends: str) -> torch.optim.Optimizer:
    return torch.optim.SGD(named(model, *ends), lr=0.1, momentum=0.9)


MAKE: dict[str, Callable[[nn.Module], Optimizers]] = {
    "torch.optim.Adafactor": lambda m: [torch.optim.Adafactor(two_groups(m), lr=1e-2, weight_decay=0.1)],
    "transformers.Adafactor": lambda m: [transformers_adafactor(m)],
    "transformers.Adafactor with momentum": lambda m: [transformers_adafactor(m, beta1=0.9, scale_parameter=True)],
    "torch.optim.SGD": lambda m: [torch.optim.SGD(two_groups(m), lr=0.1, momentum=0.9, weight_decay=0.1)],
    "torch.optim.NAdam": lambda m: [torch.optim.NAdam(two_groups(m), lr=1e-3, weight_decay=0.1)],
    "torch.optim.RAdam": lambda m: [torch.optim.RAdam(two_groups(m), lr=1e-3, weight_decay=0.1)],
    "muon beside adamw": lambda m: [muon(m, "weight"), adamw(m, "bias")],
    "adamw beside two muons": lambda m: [
        adamw(m, "bias", amsgrad=True),
        muon(m, "c.weight"),
        muon(m, "a.weight", "b.weight", adjust_lr_fn="match_rms_adamw", nesterov=False),
    ],
    "muon beside adam with L2": lambda m: [
        muon(m, "weight"),
        torch.optim.Adam(named(m, "bias"), lr=1e-3, weight_decay=0.1),
    ],
    "muon beside sgd": lambda m: [muon(m, "weight"), sgd(m, "bias")],
}
WRITE: dict[str, Callable[[nn.Module, Optimizers], Any]] = {
    "param_names": lambda _, each: each[0].state_dict() if len(each) == 1 else [one.state_dict() for one in each],
    "by name": lambda model, each: get_optimizer_state_dict(model, each),
    "beside the model": lambda model, each: {
        "model": model.state_dict(),
        **{f"optimizer_{n}": one.state_dict() for n, one in enumerate(each)},
    },
}


def stepped(make: Callable[[nn.Module], Optimizers], steps: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    model = Model(dtype)
    optimizers = make(model)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        fill(model, generator)
        for one in optimizers:
            one.step()
            one.zero_grad()
    return model, optimizers


def fill(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def next_step(model: nn.Module, given: Any, **options: Any) -> NextStep:
    estimate = EstimateOptions(step="next", **options)
    at_hand = read_optimizer(given, model, any_kind=True)
    registry = ParameterRegistry.build(model, at_hand.state.group_of)
    return next_step_of(at_hand, registry, preconditioner_of(at_hand, registry, estimate, next_step=True), estimate)


def total(step: NextStep, gradients: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(g) if parts is None else sum(parts.values(), torch.zeros((), dtype=g.dtype))
        for parts, g in zip(step.of(gradients), gradients, strict=True)
    ]


def taken(model: nn.Module, optimizers: Optimizers) -> list[Tensor]:
    before = [p.detach().clone() for p in model.parameters()]
    for one in optimizers:
        one.step()
    return [p.detach() - was for p, was in zip(model.parameters(), before, strict=True)]


def close(found: list[Tensor], expected: list[Tensor], allowed: float) -> None:
    for f, e in zip(found, expected, strict=True):
        assert bool(e.any())
        assert (f - e).norm() <= allowed * e.norm()


@pytest.mark.parametrize("form", WRITE)
@pytest.mark.parametrize("name", MAKE)
def test_the_next_step_from_a_file_is_the_one_that_is_taken(tmp_path: Path, name: str, form: str) -> None:
    model, optimizers = stepped(MAKE[name])
    torch.save(WRITE[form](model, optimizers), tmp_path / "optimizer.pt")
    before = copy.deepcopy(model.state_dict())
    gradients = fill(model, torch.Generator().manual_seed(3))
    step = next_step(model, tmp_path / "optimizer.pt")
    found, exactly = total(step, gradients), step.exactly(gradients)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = taken(model, optimizers)
    close(found, expected, 1e-11)
    close([e for e in exactly if e is not None], expected, 1e-14)


def test_an_optimizer_that_was_never_stepped(tmp_path: Path) -> None:
    model, optimizers = stepped(MAKE["muon beside adamw"], steps=0)
    torch.save([one.state_dict() for one in optimizers], tmp_path / "optimizer.pt")
    gradients = fill(model, torch.Generator().manual_seed(3))
    close(total(next_step(model, tmp_path / "optimizer.pt"), gradients), taken(model, optimizers), 1e-11)


@pytest.mark.parametrize("name", ["torch.optim.Adafactor", "transformers.Adafactor", "muon beside adamw"])
def test_the_state_is_kept_in_the_type_that_the_live_optimizer_has(tmp_path: Path, name: str) -> None:
    model, optimizers = stepped(MAKE[name], dtype=torch.bfloat16)
    torch.save(WRITE["param_names"](model, optimizers), tmp_path / "optimizer.pt")
    gradients = fill(model, torch.Generator().manual_seed(3))
    found = next_step(model, tmp_path / "optimizer.pt").exactly(gradients)
    before = [p.detach().float() for p in model.parameters()]
    taken(model, optimizers)
    for moved, p, was in zip(found, model.parameters(), before, strict=True):
        assert moved is not None and torch.equal(moved, p.detach().float() - was)


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.SGD])
def test_without_names_one_optimizer_is_matched_by_order(tmp_path: Path, optimizer: Any) -> None:
    """Shapes of factors tell matrices from vectors, so that Trainer's order is the only one that fits."""
    model = Model()
    ends = (("a.weight", "b.weight", "c.weight"), ("a.bias", "b.bias", "c.bias"))
    groups = [{"params": [dict(model.named_parameters())[name] for name in names]} for names in ends]
    live = optimizer(groups, lr=1e-2, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    fill(model, torch.Generator().manual_seed(2))
    live.step()
    torch.save(live.state_dict(), tmp_path / "optimizer.pt")
    at_hand = optimizer_from_file(tmp_path / "optimizer.pt", model)
    assert at_hand.state.notes == ()
    gradients = fill(model, torch.Generator().manual_seed(3))
    close(total(next_step(model, at_hand), gradients), taken(model, [live]), 1e-11)


def test_several_optimizers_without_names_are_refused(tmp_path: Path) -> None:
    model, optimizers = stepped(MAKE["muon beside adamw"])
    content = {"muon": optimizers[0].state_dict(), "adamw": optimizers[1].state_dict()}
    del content["adamw"]["param_groups"][0]["param_names"]
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match="holds 2 optimizers, at 'muon', 'adamw', that do not all name"):
        optimizer_from_file(tmp_path / "optimizer.pt", model)


def test_one_parameter_in_two_optimizers_is_refused(tmp_path: Path) -> None:
    model, optimizers = stepped(MAKE["muon beside adamw"])
    torch.save([one.state_dict() for one in (*optimizers, optimizers[1])], tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match="which are one parameter"):
        optimizer_from_file(tmp_path / "optimizer.pt", model)


def test_a_part_of_the_optimizers_is_refused(tmp_path: Path) -> None:
    model, optimizers = stepped(MAKE["muon beside adamw"])
    torch.save(optimizers[0].state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=r"not the trainable 'a\.bias' \(3 missing"):
        optimizer_from_file(tmp_path / "optimizer.pt", model)


@pytest.mark.parametrize("name", ["torch.optim.Adafactor", "transformers.Adafactor", "muon beside adamw"])
def test_adams_geometry_is_refused_by_name(tmp_path: Path, name: str) -> None:
    model, optimizers = stepped(MAKE[name])
    torch.save(WRITE["by name"](model, optimizers), tmp_path / "optimizer.pt")
    called = "torch.optim.Muon" if "muon" in name else name
    with pytest.raises(
        OptimizerStateError, match=rf"parameter group 0 is that of {called}, .*'adam_static' is Adam's"
    ) as one:
        adam_state_from_file(tmp_path / "optimizer.pt", model)
    assert "--step next" in one.value.fix
    with pytest.raises(OptimizerStateError, match="'adam_static' is Adam's") as two:
        read_optimizer(tmp_path / "optimizer.pt", model, any_kind=False)
    assert "step='next'" in two.value.fix


def test_a_frozen_parameter_is_left_out(tmp_path: Path) -> None:
    model, optimizers = stepped(MAKE["muon beside adamw"])
    torch.save(WRITE["by name"](model, optimizers), tmp_path / "optimizer.pt")
    model.b.weight.requires_grad_(False)
    at_hand = optimizer_from_file(tmp_path / "optimizer.pt", model)
    assert isinstance(at_hand.live, JoinedOptimizer)
    assert set(at_hand.state.group_of) == set(SHAPES) - {"b.weight"}


def test_relative_steps_have_no_learning_rate(tmp_path: Path) -> None:
    model, optimizers = stepped(lambda m: [transformers_adafactor(m, lr=None, relative_step=True, warmup_init=True)])
    for group in optimizers[0].param_groups:
        group["lr"] = None
    torch.save(optimizers[0].state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(LearningRateError, match="finds its own cannot be forecast"):
        optimizer_from_file(tmp_path / "optimizer.pt", model)


def entry_of(content: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = content["state"][name]
    return found


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("torch.optim.Adafactor", lambda e: e.update(row_var=-e["row_var"]), "'row_var' negative means of squares"),
        (
            "torch.optim.Adafactor",
            lambda e: e.update(col_var=e["col_var"] * float("nan")),
            "'col_var' values that are not finite",
        ),
        ("torch.optim.Adafactor", lambda e: e.update(col_var=e["row_var"]), r"as 'col_var' a tensor of shape \[4, 1\]"),
        ("torch.optim.Adafactor", lambda e: e.update(step=float("nan")), "as 'step' nan"),
        ("torch.optim.Adafactor", lambda e: e.pop("step"), r"has keys \['col_var', 'row_var'\]"),
        ("transformers.Adafactor", lambda e: e.update(exp_avg=e["exp_avg_sq_row"]), "has keys .*'exp_avg'"),
        (
            "transformers.Adafactor",
            lambda e: e.update(exp_avg_sq_row=e["exp_avg_sq_col"]),
            "as 'exp_avg_sq_row' a tensor",
        ),
        (
            "torch.optim.SGD",
            lambda e: e.update(momentum_buffer=torch.ones(2)),
            "as 'momentum_buffer' a tensor of shape",
        ),
        ("torch.optim.NAdam", lambda e: e.update(mu_product="one"), "as 'mu_product' 'one'"),
    ],
)
def test_state_that_no_such_optimizer_has_is_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    model, optimizers = stepped(MAKE[name])
    content = get_optimizer_state_dict(model, optimizers)
    change(entry_of(content, "b.weight"))
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=message):
        optimizer_from_file(tmp_path / "optimizer.pt", model)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "torch.optim.Adafactor",
            {"d": 0.5},
            "that of torch.optim.Adafactor, which cannot be made of it: ValueError: Clipping",
        ),
        (
            "muon beside adamw",
            {"adjust_lr_fn": "own"},
            "that of torch.optim.Muon, which cannot be made of it: ValueError",
        ),
        ("torch.optim.SGD", {"momentum": -1.0}, "that of torch.optim.SGD, which cannot be made of it"),
        ("torch.optim.SGD", {"momentum": torch.ones(2)}, "of torch.optim.SGD, has as 'momentum' a tensor of shape"),
        ("muon beside adamw", {"eps": float("nan")}, "of torch.optim.Muon, has as 'eps' nan"),
        ("torch.optim.SGD", {"lr": "fast"}, "that of torch.optim.SGD, which cannot be made of it"),
    ],
)
def test_settings_that_the_class_refuses_are_its_words(tmp_path: Path, name: str, settings: Any, message: str) -> None:
    model, optimizers = stepped(MAKE[name])
    content = get_optimizer_state_dict(model, optimizers)
    content["param_groups"][0].update(settings)
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=message):
        optimizer_from_file(tmp_path / "optimizer.pt", model)


def test_settings_kept_by_parameter_are_told_and_read(tmp_path: Path) -> None:
    """Flattened, a Muon's and an AdamW's groups lie side by side without their order."""
    model, optimizers = stepped(MAKE["adamw beside two muons"])
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    torch.save(get_optimizer_state_dict(model, optimizers, options=flat), tmp_path / "optimizer.pt")
    gradients = fill(model, torch.Generator().manual_seed(3))
    at_hand = optimizer_from_file(tmp_path / "optimizer.pt", model)
    (note,) = at_hand.state.notes
    assert "keeps settings by parameter and no groups" in note and "is that of 'c.bias'" in note
    close(total(next_step(model, at_hand), gradients), taken(model, optimizers), 1e-11)
