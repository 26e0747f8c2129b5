"""The Triton kernels: interpreted against the truth, and compiled for GPUs that need not be here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_drivers import REPOSITORY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SUPPORT = REPOSITORY / "tests" / "_support"


def _run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**inherited, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
def test_interpreted_kernels_are_right() -> None:
    done = _run("triton_interpreted.py", TRITON_INTERPRET="1")
    assert done.stdout == "checked 68\n"


@pytest.mark.slow
def test_kernels_compile_for_every_target_without_spilling(tmp_path: Path) -> None:
    # A cache of its own: a kernel compiled before would not be compiled again.
    done = _run("triton_ahead_of_time.py", TRITON_CACHE_DIR=str(tmp_path))
    report = json.loads(done.stdout)
    assert len(report) == 2 * 4 * 4
    assert {name: spill for name, spill in report.items() if spill} == {}
