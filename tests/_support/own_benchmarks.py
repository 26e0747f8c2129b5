"""The benchmarks of this repository, importable by the name they have when a command runs from its root."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the package in ``sys.modules``.

    Not by way of ``sys.path``: at its end an installed package of that name would come first (Opacus has one), and at its front
    the source tree would come before the installed entropy_fast.
    """
    if getattr(sys.modules.get("benchmarks"), "__file__", None) == str(ROOT / "benchmarks" / "__init__.py"):
        return
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks", package)
    spec.loader.exec_module(package)
