"""``entropy-fast validate``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_policy import saved_run

from entropy_fast.cli.app import run


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = saved_run(tmp_path_factory.mktemp("run"))
    shutil.copy(folder / "rollouts.jsonl", folder / "others.jsonl")
    return folder


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def test_a_run_folder_is_held_against_its_step(folder, capsys):
    out = folder / "out"
    assert run(["validate", str(folder), "--etas", "0.1,1", "--out", str(out), "--verbose"]) == 0
    document = json.loads((out / "validation.json").read_text())
    assert document["schema"] == "entropy_fast.validation/1"
    found = document["runs"][str(folder)]
    assert found["geometry"] == "next_step" and [p["eta"] for p in found["points"]] == [0.1, 1]
    assert found["slope"] == pytest.approx(1, abs=0.05)
    assert found["total_slope"] is None  # no held-out responses
    shown = capsys.readouterr().out
    assert "both ways" in shown and "Direct: the step taken" in shown and "Pareto" not in shown
    assert (out / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_its_own_responses_are_refused_as_held_out(folder, capsys):
    assert run(["validate", str(folder), "--held-out", str(folder / "others.jsonl")]) == 3
    assert "that the forecast was made from" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "validation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--etas", "1,x"], "--etas is", 2),
        (["--etas", "0"], "etas are", 3),
        (["--held-out", "missing.jsonl"], "missing.jsonl", 3),
    ],
)
def test_what_cannot_be_meant_is_said(folder, capsys, arguments, message, status):
    assert run(["validate", str(folder), *arguments]) == status
    assert message in " ".join(capsys.readouterr().err.split())


def test_several_runs_have_held_out_responses_of_their_own(folder, capsys):
    assert run(["validate", str(folder), str(folder), "--held-out", str(folder / "others.jsonl")]) == 2
    assert "several run folders" in " ".join(capsys.readouterr().err.split())
