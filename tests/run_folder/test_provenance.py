"""Where a result came from."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

from entropy_fast import __version__
from entropy_fast.run_folder.model_source import ModelSource
from entropy_fast.run_folder.provenance import provenance_of


def test_what_is_recorded():
    found = provenance_of(
        [["entropy-fast", "probe", "a run", "--out", "x"]],
        ModelSource("small", load_in_4bit=True),
        {"rollouts": Path("r.jsonl"), "adapter": None},
        "AdamW",
    )
    assert found.commands == ("entropy-fast probe 'a run' --out x",)
    assert found.directory == os.getcwd()
    assert (found.model, found.dtype, found.device) == ("small", "float32, linear layers in 4 bits", "cpu")
    assert found.files == {"rollouts": "r.jsonl"}
    assert found.versions["torch"] == torch.__version__
    assert found.versions["python"] == platform.python_version()
    assert found.versions["entropy-fast"] == __version__
    assert found.optimizer == "AdamW"
    assert datetime.datetime.fromisoformat(found.finished).tzinfo is not None
