"""How this installation is started from a shell, and what is known of an optimizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from entropy_fast.cli.origin import optimizer_kind, program
from entropy_fast.step.reading import OptimizerAtHand


@pytest.fixture
def environment(tmp_path: Path, monkeypatch) -> Path:
    """One whose script is not on the PATH."""
    folder = tmp_path / "project" / ".venv" / "bin"
    folder.mkdir(parents=True)
    _script(folder)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    return folder


def _script(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    script = folder / "entropy-fast"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return script


def test_it_is_called_as_it_can_be_typed(environment, tmp_path, monkeypatch):
    assert program() == ["project/.venv/bin/entropy-fast"]
    monkeypatch.chdir(environment.parent)
    assert program() == ["bin/entropy-fast"]
    _script(tmp_path / "elsewhere")  # another installation
    assert program() == ["bin/entropy-fast"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program() == [str(environment / "entropy-fast")]
    monkeypatch.setenv("PATH", str(environment))
    assert program() == ["entropy-fast"]


def test_without_a_script_it_is_a_module(environment):
    (environment / "entropy-fast").unlink()
    assert program() == [str(environment / "python"), "-m", "entropy_fast"]


def test_the_kind_of_an_optimizer():
    """Of what was read from a file with Adam's moments only that."""
    live = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert optimizer_kind(OptimizerAtHand(None, live)) == "SGD"
    assert optimizer_kind(OptimizerAtHand(None)) == "Adam or AdamW"
