"""The benchmarks and examples of this repository, importable by the names they have when a command runs from its root."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the packages in ``sys.modules``.

    Not by way of ``sys.path``: at its end installed packages of those names would come first (Opacus has both), and at its
    front the source tree would come before the installed entropy_fast.
    """
    for name in ("benchmarks", "examples"):
        folder = ROOT / name
        if getattr(sys.modules.get(name), "__file__", None) == str(folder / "__init__.py"):
            continue
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, package)
        spec.loader.exec_module(package)
