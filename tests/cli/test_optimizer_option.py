"""``--optimizer``: checkpoint folders, and optimizers other than Adam, against the library with the live optimizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_policy import saved_run
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from entropy_fast import fast_delta_h1, read_rollouts
from entropy_fast.cli.app import run
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A run folder, and beside its own optimizer folders of others: ``adamw`` and ``muon`` (beside an AdamW)."""
    folder = saved_run(tmp_path_factory.mktemp("run"))
    model = loaded(folder)
    for name, optimizers in (("adamw", adamw(model)), ("muon", muon(model))):
        step(model, optimizers)
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizers)}, checkpoint_id=folder / name, no_dist=True)
    return folder


@pytest.fixture
def folder(stored, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COLUMNS", "300")
    return Path(shutil.copytree(stored, tmp_path / "run"))


def loaded(folder):
    return attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")


def adamw(model):
    named = [pair for pair in model.named_parameters() if pair[1].requires_grad][::-1]
    return [torch.optim.AdamW([{"params": named[:9], "lr": 3e-3}, {"params": named[9:]}], lr=1e-3)]


def muon(model):
    named = [pair for pair in model.named_parameters() if pair[1].requires_grad]
    split = [[pair for pair in named if part in pair[0]] for part in ("lora_B", "lora_A")]
    return [torch.optim.Muon(split[0], lr=1e-2), torch.optim.AdamW(split[1], lr=1e-3)]


def step(model, optimizers):
    """From random gradients: the model goes back to where it was, the optimizers do not."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
    for one in optimizers:
        one.step()
        one.zero_grad()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(kept[name])


def probed(folder, *options):
    arguments = ["--model", str(folder / "base"), "--adapter", str(folder / "adapter"), "--no-picture"]
    arguments += ["--rollouts", str(folder / "rollouts.jsonl"), "--out", str(folder / "out")]
    assert run(["probe", *arguments, *options]) == 0
    return json.loads((folder / "out" / "result.json").read_text())


@pytest.mark.parametrize(("name", "make"), [pytest.param("adamw", adamw, marks=pytest.mark.exhaustive), ("muon", muon)])
def test_a_checkpoint_folder_is_the_live_optimizers(folder, name, make):
    model = loaded(folder)
    optimizers = make(model)
    step(model, optimizers)
    live = optimizers[0] if len(optimizers) == 1 else optimizers
    expected = fast_delta_h1(model, live, read_rollouts(folder / "rollouts.jsonl"))
    found = probed(folder, "--optimizer", str(folder / name), *(["--step", "next"] if name == "adamw" else []))
    assert found["delta_h1"] == pytest.approx(expected.delta_h1, rel=1e-6)
    assert found["std_error"] == pytest.approx(expected.std_error, rel=1e-6)
    assert found["geometry"] == expected.geometry == "next_step"


@pytest.mark.exhaustive
def test_a_run_folder_may_have_a_checkpoint_folder(folder):
    expected = probed(folder, "--optimizer", str(folder / "adamw"))
    manifest = json.loads((folder / "run.json").read_text())
    manifest["optimizer"] = "adamw"
    (folder / "run.json").write_text(json.dumps(manifest))
    assert run(["probe", str(folder), "--no-picture", "--out", str(folder / "own")]) == 0
    assert json.loads((folder / "own" / "result.json").read_text())["delta_h1"] == expected["delta_h1"]


def test_adams_geometry_of_a_muon_is_refused(folder, capsys):
    command = ["probe", str(folder), "--no-picture", "--out", str(folder / "o"), "--optimizer", str(folder / "muon")]
    assert run([*command, "--step", "adam_static"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "torch.optim.Muon beside torch.optim.adamw.AdamW; the geometry 'adam_static' is Adam's" in said
    assert not (folder / "o").exists()


def test_doctor_says_what_it_was_made_again_as(folder, capsys):
    options = [
        "--model",
        str(folder / "base"),
        "--adapter",
        str(folder / "adapter"),
        "--optimizer",
        str(folder / "muon"),
    ]
    assert run(["doctor", *options, "--rollouts", str(folder / "rollouts.jsonl")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "torch.optim.Muon beside torch.optim.adamw.AdamW, made again from its file: holds 28 of 28 tensors" in shown
    assert "one_pass agrees with two_pass" in shown
