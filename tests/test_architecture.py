"""The shape of the source tree: imports point downward, files stay short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from import_layers import PACKAGE, violations

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
SOURCES = ("*.py", "*.pyi", "*.cpp", "*.cu", "*.cuh", "*.h", "*.hpp")


def test_imports_point_downward() -> None:
    assert (ROOT / PACKAGE / "probe_components.py").exists()
    assert violations(ROOT) == []


def make_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in {(root / PACKAGE / name).parent for name in files}:
        (folder / "__init__.py").touch()
    return root


GOOD = {
    "__init__.py": "from entropy_fast import api\n",
    "errors.py": "",
    "config.py": "from entropy_fast.errors import ConfigError\n",
    "reference/plain.py": "import torch\n",
    "ops/native.py": "from entropy_fast import _native\nfrom entropy_fast.kernels import fast\n",
    "checks/state.py": "from entropy_fast.rollouts import container\n",
    "rollouts/container.py": "from ..errors import RolloutsError\n",
    "engines/sums.py": "from entropy_fast.checks.state import look\n",
    "truth/importance.py": "from entropy_fast.estimates import spread\n",
    "estimates/spread.py": "",
    "api.py": "from entropy_fast.engines.sums import add\n",
    "cli.py": "from entropy_fast.api import run\n",
}


def test_a_tree_in_order_is_accepted(tmp_path: Path) -> None:
    assert violations(make_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("checks/bad.py", "from entropy_fast.engines.sums import add\n", "checks imports engines from a layer above"),
        ("checks/bad.py", "import entropy_fast.engines.sums\n", "checks imports engines from a layer above"),
        ("checks/bad.py", "from entropy_fast import engines\n", "checks imports engines from a layer above"),
        ("checks/bad.py", "from ..engines import sums\n", "checks imports engines from a layer above"),
        ("checks/bad.py", "from .. import engines\n", "checks imports engines from a layer above"),
        (
            "checks/bad.py",
            "def late():\n    from entropy_fast.api import x\n",
            "checks imports api from a layer above",
        ),
        (
            "checks/bad.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from entropy_fast.cli import x\n",
            "checks imports cli from a layer above",
        ),
        (
            "checks/bad.py",
            "from importlib import import_module\nm = import_module('entropy_fast.api')\n",
            "checks imports api from a layer above",
        ),
        ("errors.py", "from entropy_fast.reference import plain\n", "errors imports reference from a layer above"),
        ("reference/bad.py", "from entropy_fast.ops import native\n", "reference imports ops from a layer above"),
        ("engines/bad.py", "from entropy_fast import _native\n", "engines imports entropy_fast._native"),
        ("cli.py", "import entropy_fast.kernels.fast\n", "cli imports entropy_fast.kernels"),
        ("reference/bad.py", "from entropy_fast._native import run\n", "reference imports entropy_fast._native"),
        ("engines/bad.py", "from entropy_fast.truth.importance import x\n", "the estimate (engines) imports the truth"),
        ("estimates/bad.py", "from entropy_fast.truth import x\n", "the estimate (estimates) imports the truth"),
        ("api.py", "from entropy_fast.truth import x\n", "the estimate (api) imports the truth"),
        ("probe_components.py", "import entropy_fast.truth\n", "the estimate (probe_components) imports the truth"),
        ("offline_entropy_probe.py", "from . import truth\n", "the estimate (offline_entropy_probe) imports the truth"),
        (
            "checks/bad.py",
            "from entropy_fast.errors import register_accessor\nregister_accessor('a', 'entropy_fast.cli:run')\n",
            "checks/bad.py:2: says where an accessor is",
        ),
        ("checks/bad.py", "import entropy_fast\n", "imports entropy_fast itself"),
        ("novelty/bad.py", "", "'novelty' is in no layer"),
        ("checks/bad.py", "from entropy_fast.novelty import x\n", "imports 'novelty', which is in no layer"),
    ],
)
def test_a_tree_out_of_order_is_refused(tmp_path: Path, name: str, text: str, expected: str) -> None:
    found = violations(make_tree(tmp_path, GOOD | {name: text}))
    assert any(expected in sentence for sentence in found), found


def test_cycles_are_refused_unless_deferred(tmp_path: Path) -> None:
    files = GOOD | {"sampling/sampler.py": "from entropy_fast.run_folder import manifest\n"}
    back = {"run_folder/manifest.py": "from entropy_fast.sampling import sampler\n"}
    cycle, circle = violations(make_tree(tmp_path / "cycle", files | back))
    assert cycle.startswith("import cycle: ")
    assert {"entropy_fast.run_folder.manifest", "entropy_fast.sampling.sampler"} <= set(cycle[14:].split(" -> "))
    assert circle.startswith("folders in a circle: ")
    back = {"run_folder/manifest.py": "def late():\n    from entropy_fast.sampling import sampler\n"}
    assert violations(make_tree(tmp_path / "deferred", files | back)) == []


def test_folders_in_a_circle_are_refused_where_no_file_is_in_one(tmp_path: Path) -> None:
    files = {
        "sampling/sampler.py": "from entropy_fast.run_folder import manifest\n",
        "sampling/texts.py": "",
        "run_folder/manifest.py": "",
        "run_folder/texts.py": "from entropy_fast.sampling import texts\n",
    }
    (found,) = violations(make_tree(tmp_path, GOOD | files))
    assert found.startswith("folders in a circle: ")
    assert {"entropy_fast.run_folder", "entropy_fast.sampling"} <= set(found[21:].split(" -> "))


def too_long(root: Path) -> list[str]:
    found = []
    for folder in (PACKAGE, "csrc", "kernels"):
        for pattern in SOURCES:
            for path in sorted((root / folder).rglob(pattern)):
                lines = len(path.read_text(encoding="utf-8").splitlines())
                if lines > MAX_LINES:
                    found.append(f"{path.relative_to(root)}: {lines} lines")
    return found


def test_no_source_file_is_longer_than_a_reader_s_patience(tmp_path: Path) -> None:
    assert too_long(ROOT) == []
    for number, name in enumerate((f"{PACKAGE}/a.py", "csrc/cuda/b.cu", "kernels/triton/c.py")):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("x\n" * MAX_LINES)
        assert len(too_long(tmp_path)) == number
        path.write_text("x\n" * (MAX_LINES + 1))
        assert len(too_long(tmp_path)) == number + 1


def test_the_kernels_folder_is_no_package() -> None:
    """A package of that name at the root would shadow Hugging Face's `kernels` for whoever runs from there."""
    assert (ROOT / "kernels" / "triton" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_architecture_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = sorted({path for path in re.findall(r"`([\w./]+)`", page) if "/" in path or path.endswith(".py")})
    assert len(paths) > 20
    missing = [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / PACKAGE))]
    assert missing == []
