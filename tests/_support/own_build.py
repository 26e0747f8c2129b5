"""Calls of the build backend on a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.py", "*.toml", "*.txt", "*.in", "*.md", "*.cff", "LICENSE", "Makefile", ".clang-format")


def python_says(*arguments: str, cwd: Path, timeout: int = 120, **environment: str) -> str:
    """Standard output of this interpreter, which has to succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        # The build's tools come with the development extra, next to the interpreter.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_of_sources(folder: Path) -> Path:
    """The sources without what earlier builds left, so that nothing of this machine's build is shipped by accident."""
    for name in ("csrc", "entropy_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for pattern in PATTERNS:
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder / file.name)
    return folder


def built(call: str, sources: Path, output: Path, timeout: int = 120, **environment: str) -> Path:
    """The file that a call of the build backend leaves in ``output``, with the tools of this environment."""
    for module in ("pybind11", "setuptools"):
        pytest.importorskip(module, reason="building needs it")
    output.mkdir()
    script = f"import sys, setuptools.build_meta as b; b.{call}(sys.argv[1])"
    python_says("-c", script, str(output), cwd=sources, timeout=timeout, **environment)
    (made,) = output.iterdir()
    return made
