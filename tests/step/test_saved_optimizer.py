"""Where an optimizer's state_dict lies in what was saved, and what it is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import AdamState, adam_state_from_file
from entropy_fast.step.saved_optimizer import saved_optimizer

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Layers of one shape; two groups, the last layers first."""
    torch.manual_seed(0)
    model = nn.Module()
    model.inner = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])  # type: ignore[assignment]
    named = list(model.named_parameters())[::-1]
    optimizer = torch.optim.AdamW([{"params": named[:4], "lr": 3e-3}, {"params": named[4:]}], lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def assert_as_live(found: AdamState, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    live = AdamState.from_optimizer(optimizer, model)
    assert dict(found.group_of) == dict(live.group_of) and found.groups == live.groups
    for name, expected in live.moments.items():
        assert torch.equal(found.moments[name].second_moment, expected.second_moment)


@pytest.mark.parametrize(
    "around",
    [
        lambda state: state,
        lambda state: {"optimizer": state},
        lambda state: {"epoch": 3, "model": {"weight": torch.ones(2)}, "optimizer": state, "rng": torch.zeros(5)},
        lambda state: {"app": {"model": {}, "optim": state}},
        lambda state: [3, {"x": [state]}],
    ],
)
@pytest.mark.parametrize("form", ["numbers with names", "names", "flattened"])
def test_it_is_found_wherever_it_lies(tmp_path: Path, around: Any, form: str) -> None:
    model, optimizer = trained()
    state = {
        "numbers with names": optimizer.state_dict,
        "names": lambda: get_optimizer_state_dict(model, optimizer),
        "flattened": lambda: get_optimizer_state_dict(model, optimizer, options=FLAT),
    }[form]()
    torch.save(around(state), tmp_path / "checkpoint.pt")
    assert_as_live(adam_state_from_file(tmp_path / "checkpoint.pt", model), optimizer, model)


def test_two_adams_of_one_model_are_one(tmp_path: Path) -> None:
    model, _ = trained()
    named = list(model.named_parameters())[::-1]
    pair = [torch.optim.AdamW(named[:2], lr=3e-3), torch.optim.AdamW(named[2:], lr=1e-3, betas=(0.7, 0.8))]
    for one in pair:
        one.step()
    torch.save({"first": pair[0].state_dict(), "second": pair[1].state_dict()}, tmp_path / "optimizer.pt")
    found = adam_state_from_file(tmp_path / "optimizer.pt", model)
    assert [group.learning_rate for group in found.groups] == [3e-3, 1e-3]
    for index, one in enumerate(pair):
        for name, p in named:
            if p in one.state:
                assert found.group_of[name] == index
                assert torch.equal(found.moments[name].second_moment, one.state[p]["exp_avg_sq"])


def test_deeper_than_checkpoints_go_is_not_searched() -> None:
    _, optimizer = trained()
    with pytest.raises(OptimizerStateError, match="expected 'state' and 'param_groups'"):
        saved_optimizer("file", {"a": {"b": {"c": {"d": optimizer.state_dict()}}}})


def test_the_first_of_flattened_groups_is_named_where_rates_differ() -> None:
    model, optimizer = trained()
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    (note,) = saved_optimizer("file", flat).notes
    assert "the first, whose learning rate a given learning_rate is in place of, is that of 'inner.2.bias'" in note
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)  # tensors, which are other objects by parameter
    found = saved_optimizer("file", get_optimizer_state_dict(model, optimizer, options=FLAT))
    assert len(found.groups) == 1 and found.notes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flat: flat.update({"state.nobody.step": 1}), "state 'state.nobody.step' of a parameter for which"),
        (lambda flat: flat.update({"state.": 1}), "of a parameter for which it has no settings"),
        (lambda flat: flat.update({"state.inner.0.bias.step.more": 1}), "lies inside of a value"),
    ],
)
def test_flattened_parts_that_do_not_belong_together_are_refused(change: Any, message: str) -> None:
    model, optimizer = trained()
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    change(flat)
    with pytest.raises(OptimizerStateError, match=message):
        saved_optimizer("file", flat)


class Own(torch.Tensor):
    """A class that another library registers as safe to load."""


def test_tensors_of_other_classes_are_refused_by_name() -> None:
    _, optimizer = trained()
    content = optimizer.state_dict()
    content["state"][2]["exp_avg_sq"] = content["state"][2]["exp_avg_sq"].as_subclass(Own)
    with pytest.raises(OptimizerStateError, match="entry 2 has a Own"):
        saved_optimizer("file", content)


def test_numbers_that_have_become_texts_are_numbers_where_all_have() -> None:
    _, optimizer = trained()
    content = optimizer.state_dict()
    content["state"] = {str(key): entry for key, entry in content["state"].items()}
    assert set(saved_optimizer("file", content).state) == set(range(6))
    content["state"][5] = content["state"].pop("5")
    with pytest.raises(OptimizerStateError, match="which no parameter group lists"):
        saved_optimizer("file", content)
