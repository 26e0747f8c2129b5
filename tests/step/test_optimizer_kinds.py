"""Optimizers told by their settings: each by what its own class writes, and none for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import adam_state_from_file, optimizer_from_file
from entropy_fast.step.optimizer_kinds import KINDS, kind_of


def of_transformers(parameters: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    found: torch.optim.Optimizer = Adafactor(parameters, lr=1e-3, relative_step=False)
    return found


EVERY: dict[str, Any] = {
    **{name: getattr(torch.optim, name) for name in ("Adam", "AdamW", "SGD", "NAdam", "RAdam", "Adafactor", "Muon")},
    **{name: getattr(torch.optim, name) for name in ("Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop")},
    "transformers.Adafactor": of_transformers,
}


def stepped(make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False)
    optimizer = make(model.parameters())
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", EVERY)
def test_every_class_is_told_from_the_others(name: str) -> None:
    found = kind_of(stepped(EVERY[name])[1].param_groups[0])
    known = {kind.name for kind in KINDS}
    called = name if name.startswith("transformers") else f"torch.optim.{name}"
    assert (None if found is None else found.name) == (called if called in known else None)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_a_class_keeps_is_what_is_expected_of_it(kind: Any) -> None:
    """For vectors, matrices and stacks of them."""
    make = EVERY[kind.name if kind.name.startswith("transformers") else kind.name.removeprefix("torch.optim.")]
    for shape in ((4, 3),) if kind.name == "torch.optim.Muon" else ((4,), (4, 3), (2, 4, 3)):
        parameter = nn.Parameter(torch.ones(shape))
        optimizer = make([parameter]) if kind.name != "torch.optim.SGD" else torch.optim.SGD([parameter], momentum=0.9)
        parameter.grad = torch.ones(shape)
        optimizer.step()
        layout = kind.layout(shape, optimizer.param_groups[0])
        state = optimizer.state[parameter]
        assert state.keys() == layout.keys()
        assert {key: tuple(state[key].shape) for key, found in layout.items() if found is not None} == {
            key: found for key, found in layout.items() if found is not None
        }


@pytest.mark.parametrize("name", ["Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop"])
def test_classes_that_are_not_made_again_are_refused(tmp_path: Path, name: str) -> None:
    model, optimizer = stepped(EVERY[name])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(
        OptimizerStateError, match=r"Adam's lr, betas and eps are expected|expected 'exp_avg_sq'"
    ) as refusal:
        optimizer_from_file(tmp_path / "optimizer.pt", model)
    assert "given live, for step='next'" in refusal.value.fix


def with_settings(**settings: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["param_groups"][0].update(settings)

    return change


@pytest.mark.parametrize(
    ("change", "called"),
    [
        (with_settings(use_muon=True), r"a Muon with an Adam beside it \(use_muon\)"),
        (with_settings(weight_lr_power=2.0, train_mode=True), "a schedule-free optimizer"),
        (with_settings(rank=8, update_proj_gap=200), "an optimizer of projected gradients"),
        (with_settings(correct_bias=False), "an AdamW without bias correction"),
        (lambda content: content["state"][0].pop("exp_avg_sq"), "an optimizer with one state"),
        (
            lambda content: content.update(state={0: {"momentum_buffer": torch.ones(4, 3)}}),
            "an optimizer with a momentum_buffer that is neither",
        ),
    ],
)
def test_those_that_would_pass_for_another_are_named(tmp_path: Path, change: Any, called: str) -> None:
    model, optimizer = stepped(torch.optim.AdamW)
    content = optimizer.state_dict()
    change(content)
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(
        OptimizerStateError, match=f"parameter group 0 is that of {called}.*, which is not read"
    ) as refusal:
        optimizer_from_file(tmp_path / "optimizer.pt", model)
    assert "gradient='live'" in refusal.value.fix


@pytest.mark.parametrize(
    ("make", "called"),
    [
        (lambda p: pytest.importorskip("schedulefree").AdamWScheduleFree(p, lr=1e-3), "a schedule-free optimizer"),
        (lambda p: pytest.importorskip("lion_pytorch").Lion(p, lr=1e-3), "an optimizer with one state"),
    ],
)
def test_files_of_other_libraries_are_named(tmp_path: Path, make: Any, called: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False)
    optimizer = make(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=f"parameter group 0 is that of {called}"):
        optimizer_from_file(tmp_path / "optimizer.pt", model)


def test_settings_that_adam_does_not_know_are_told(tmp_path: Path) -> None:
    model, optimizer = stepped(torch.optim.AdamW)
    optimizer.param_groups[0].update(trust_ratio=True, initial_lr=1e-3, correct_bias=True)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (note,) = adam_state_from_file(tmp_path / "optimizer.pt", model).notes
    assert "read as those of Adam, and have settings that it does not know: 'trust_ratio'." in note


def test_and_so_are_those_that_a_class_made_again_does_not_take(tmp_path: Path) -> None:
    model, optimizer = stepped(torch.optim.Muon)
    optimizer.param_groups[0].update(initial_lr=1e-3, of_a_later_version=True)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (note,) = optimizer_from_file(tmp_path / "optimizer.pt", model).state.notes
    assert "read as those of torch.optim.Muon, and have settings that it does not know: 'of_a_later_version'." in note


def test_how_a_step_was_computed_elsewhere_is_left_there(tmp_path: Path) -> None:
    """A capturable optimizer steps on GPUs alone."""
    model, optimizer = stepped(torch.optim.NAdam)
    optimizer.param_groups[0]["capturable"] = True
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    at_hand = optimizer_from_file(tmp_path / "optimizer.pt", model)
    assert at_hand.live is not None and at_hand.live.param_groups[0]["capturable"] is False
