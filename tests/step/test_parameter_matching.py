"""Which parameter an entry of an optimizer file belongs to: names win, orders are checked, and guesses are said to be guesses.

The live optimizer, whose parameters are matched by identity, is the oracle everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import AdamState, adam_state_from_file


class Layers(nn.Module):
    """Layers of one shape, so that nothing but names or order tells their parameters apart."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(3)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Steps with gradients that make every parameter's second moments its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def assert_as_live(found: AdamState, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The trainable parameters' rates, groups and moments are those of the live optimizer."""
    live = AdamState.from_optimizer(optimizer, model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.groups == live.groups
    assert dict(found.group_of) == {name: group for name, group in live.group_of.items() if name in trainable}
    assert found.moments.keys() == live.moments.keys() & trainable
    for name, moments in found.moments.items():
        assert moments.step == live.moments[name].step
        assert torch.equal(moments.second_moment, live.moments[name].second_moment), name


def read(content: Any, model: nn.Module, folder: Path) -> AdamState:
    torch.save(content, folder / "optimizer.pt")
    return adam_state_from_file(folder / "optimizer.pt", model)


def from_the_top_down(model: Layers) -> torch.optim.Optimizer:
    """Learning rates by layer, the last layer first: shapes fit in named_parameters() order too."""
    groups = [
        {"params": list(layer.parameters()), "lr": 1e-3 / (i + 1)} for i, layer in enumerate(reversed(model.layers))
    ]
    return stepped(model, torch.optim.AdamW(groups))


def test_parameters_listed_by_name_are_not_read_by_order(tmp_path: Path) -> None:
    model = Layers()
    optimizer = from_the_top_down(model)
    found = read(get_optimizer_state_dict(model, optimizer), model, tmp_path)
    assert_as_live(found, optimizer, model)
    assert found.notes == ()


def test_the_same_without_names_says_that_it_guesses(tmp_path: Path) -> None:
    model = Layers()
    (note,) = read(from_the_top_down(model).state_dict(), model, tmp_path).notes
    assert "order was guessed" in note
    assert "3 groups were filled in named_parameters() order" in note
    assert "would fit too" not in note


def test_a_second_order_that_fits_and_assigns_differently_is_named(tmp_path: Path) -> None:
    """Weights and biases of one shape: Trainer's two groups and consecutive slices both fit."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_weight, self.a_bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
            self.b_weight, self.b_bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    model = Scales()
    groups = [
        {"params": [model.a_weight, model.b_weight]},
        {"params": [model.a_bias, model.b_bias], "weight_decay": 0.0},
    ]
    optimizer = stepped(model, torch.optim.AdamW(groups, lr=1e-3))
    found = read(optimizer.state_dict(), model, tmp_path)
    assert_as_live(found, optimizer, model)
    (note,) = found.notes
    assert "order of transformers' Trainer" in note
    assert "named_parameters() order would fit too, and assign them differently" in note


def test_one_group_and_the_only_order_that_fits_are_no_guess(tmp_path: Path) -> None:
    model = Layers()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    found = read(optimizer.state_dict(), model, tmp_path)
    assert_as_live(found, optimizer, model)
    assert found.notes == ()


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_over_frozen_parameters_too(tmp_path: Path, named: bool) -> None:
    model = Layers(4)
    for index in (0, 2):
        model.layers[index].requires_grad_(False)
    optimizer = stepped(model, torch.optim.AdamW(model.named_parameters() if named else model.parameters()))
    found = read(optimizer.state_dict(), model, tmp_path)
    assert_as_live(found, optimizer, model)
    assert set(found.moments) == {"layers.1.weight", "layers.1.bias", "layers.3.weight", "layers.3.bias"}
    assert found.notes == ()


def test_state_of_a_parameter_frozen_since_is_left_out_by_name_and_refused_by_order(tmp_path: Path) -> None:
    model = Layers()
    optimizer = stepped(model, torch.optim.AdamW(model.named_parameters()))
    content = optimizer.state_dict()
    model.layers[1].weight.requires_grad_(False)
    assert_as_live(read(content, model, tmp_path), optimizer, model)
    del content["param_groups"][0]["param_names"]
    with pytest.raises(OptimizerStateError, match=r"entry 2 was stepped where 'layers\.1\.weight' is frozen"):
        read(content, model, tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("listed", [False, True])
def test_names_given_by_wrappers(tmp_path: Path, prefix: str, listed: bool) -> None:
    model = Layers()
    optimizer = from_the_top_down(model)
    content = get_optimizer_state_dict(model, optimizer)
    if listed:  # as param_names beside numbers
        names = [group["params"] for group in content["param_groups"]]
        content = optimizer.state_dict()
        for group, its_names in zip(content["param_groups"], names, strict=True):
            group["param_names"] = [prefix + name for name in its_names]
    else:
        content["state"] = {prefix + name: entry for name, entry in content["state"].items()}
        for group in content["param_groups"]:
            group["params"] = [prefix + name for name in group["params"]]
    assert_as_live(read(content, model, tmp_path), optimizer, model)


def test_names_of_a_model_whose_layers_are_compiled(tmp_path: Path) -> None:
    model = Layers()
    content = get_optimizer_state_dict(model, from_the_top_down(model))
    plain = read(content, model, tmp_path)
    for index in range(3):
        model.layers[index] = torch.compile(model.layers[index], backend="eager")
    found = read(content, model, tmp_path)
    assert {name.replace("_orig_mod.", ""): group for name, group in found.group_of.items()} == dict(plain.group_of)
    assert all("_orig_mod" in name for name in found.moments)


def test_a_model_with_a_part_called_module_keeps_it_apart(tmp_path: Path) -> None:
    model = nn.Module()
    model.module, model.weight = nn.Module(), nn.Parameter(torch.ones(2))  # type: ignore[assignment]
    model.module.weight = nn.Parameter(torch.ones(2))  # type: ignore[union-attr]
    optimizer = stepped(model, torch.optim.AdamW(list(model.named_parameters())[::-1]))
    assert_as_live(read(optimizer.state_dict(), model, tmp_path), optimizer, model)
    content = optimizer.state_dict()
    content["param_groups"][0]["param_names"] = ["module.module.weight", "weight"]
    with pytest.raises(OptimizerStateError, match=r"names 'module\.module\.weight'; the model has 2 such"):
        read(content, model, tmp_path)


@pytest.mark.parametrize("other_name", [False, True])
def test_tied_parameters_under_either_name(tmp_path: Path, other_name: bool) -> None:
    model = Tied()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    content = get_optimizer_state_dict(model, optimizer)
    if other_name:
        content["state"]["head.weight"] = content["state"].pop("embedding.weight")
        listed = content["param_groups"][0]["params"]
        listed[listed.index("embedding.weight")] = "head.weight"
    assert_as_live(read(content, model, tmp_path), optimizer, model)


def rename(content: dict[str, Any], old: str, new: str) -> None:
    names = content["param_groups"][0]["param_names"]
    names[names.index(old)] = new


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("layers.9.weight", r"names 'layers\.9\.weight'; the model has no such parameter"),
        ("layers.0.weight", r"'layers\.0\.weight' and 'layers\.0\.weight', which are one parameter"),
        ("bad\x1b[31m", r"names 'bad\\x1b\[31m'"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, new: str, message: str) -> None:
    model = Layers()
    content = stepped(model, torch.optim.AdamW(model.named_parameters())).state_dict()
    rename(content, "layers.1.weight", new)
    with pytest.raises(OptimizerStateError, match=message) as refusal:
        read(content, model, tmp_path)
    assert "\x1b" not in str(refusal.value)


def test_a_trainable_parameter_that_a_named_file_lacks_is_named(tmp_path: Path) -> None:
    model = Layers()
    optimizer = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if n != "layers.1.bias"])
    with pytest.raises(OptimizerStateError, match=r"not the trainable 'layers\.1\.bias' \(1 missing"):
        read(stepped(model, optimizer).state_dict(), model, tmp_path)


@pytest.mark.parametrize("names", [None, 3, "abcdef", ["layers.0.weight"], [["a"]] * 6, [{}] * 6, [None] * 6])
def test_names_that_are_none_are_refused_and_not_passed_over(tmp_path: Path, names: Any) -> None:
    model = Layers()
    content = stepped(model, torch.optim.AdamW(model.parameters())).state_dict()
    content["param_groups"][0]["param_names"] = names
    with pytest.raises(OptimizerStateError, match="has 6 parameters and as 'param_names'"):
        read(content, model, tmp_path)


def test_bitsandbytes_32_bit_files_are_read(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Layers()
    optimizer = stepped(model, bitsandbytes.optim.AdamW32bit(model.parameters(), lr=1e-3, betas=(0.9, 0.97)))
    found = read(optimizer.state_dict(), model, tmp_path)
    twin = copy.deepcopy(model)
    reference = AdamState.from_optimizer(
        stepped(twin, torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.97))), twin
    )
    # bitsandbytes' files do not say whose decay it is.
    assert found.groups == tuple(dataclasses.replace(group, decoupled=None) for group in reference.groups)
    for name, moments in reference.moments.items():
        assert found.moments[name].step == 1
        torch.testing.assert_close(found.moments[name].second_moment, moments.second_moment, rtol=1e-5, atol=0)
    assert ["bitsandbytes" in note for note in found.notes] == [True]
    with pytest.raises(OptimizerStateError, match=r"bitsandbytes\.optim\.adamw\.AdamW32bit.* not read live"):
        AdamState.from_optimizer(optimizer, model)


@pytest.mark.parametrize("kind", ["Lion", "AdEMAMix"])
def test_other_optimizers_of_bitsandbytes_are_refused_and_not_called_8_bit(tmp_path: Path, kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Layers()
    optimizer = stepped(model, getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3))
    with pytest.raises(OptimizerStateError, match=rf"parameter group 0 is that of .*{kind}") as refusal:
        read(optimizer.state_dict(), model, tmp_path)
    assert "8-bit" not in str(refusal.value)


def test_a_scheduler_is_told_so_in_a_file_and_live(tmp_path: Path) -> None:
    model = Layers()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(stepped(model, torch.optim.AdamW(model.parameters())), 10)
    with pytest.raises(OptimizerStateError, match="state of a learning-rate scheduler"):
        read(scheduler.state_dict(), model, tmp_path)
    with pytest.raises(OptimizerStateError, match="CosineAnnealingLR, which is a learning-rate scheduler"):
        AdamState.from_optimizer(scheduler, model)  # type: ignore[arg-type]
