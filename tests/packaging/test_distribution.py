"""What is installed and shipped, and what importing from a checkout finds."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from kernel_drivers import REPOSITORY
from own_build import built, copy_of_sources, python_says

import entropy_fast
from entropy_fast import _native


def test_library_and_package_are_one_version() -> None:
    assert _native.build_info()["version"] == entropy_fast.__version__


def test_library_loads_without_a_driver() -> None:
    count, reason = _native.cuda_device_count()
    assert count >= 0 or reason


def test_tests_import_the_installed_package() -> None:
    assert Path(entropy_fast.__file__).parent != REPOSITORY / "entropy_fast"


def test_another_package_called_kernels_is_still_found(tmp_path: Path) -> None:
    # transformers and bitsandbytes import a package of that name; the folder kernels/ must not stand in its place.
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("origin = 'another package'\n")
    printed = python_says("-c", "import kernels; print(kernels.origin)", cwd=REPOSITORY, PYTHONPATH=str(tmp_path))
    assert printed == "another package\n"
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_everything_is_found_from_the_root_of_a_checkout() -> None:
    # `python -m benchmarks.x` imports entropy_fast from the working directory.
    script = (
        "import entropy_fast, entropy_fast._native, entropy_fast.kernels as k; print(entropy_fast.__file__, k.__file__)"
    )
    package, kernels = python_says("-c", script, cwd=REPOSITORY).split()
    assert Path(package) == REPOSITORY / "entropy_fast" / "__init__.py"
    assert Path(kernels).parent.name == "kernels"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_sources(tmp_path_factory.mktemp("checkout"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_wheel(checkout: Path, tmp_path: Path) -> None:
    # What is shipped, not how fast it is: without optimisation the kernels compile ten times as fast.
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/bash\nexec "${@/#-O3/-O0}"\n')
    launcher.chmod(0o755)
    environment = {"ENTROPY_FAST_CUDA": "off", "CMAKE_CXX_COMPILER_LAUNCHER": str(launcher)}
    wheel = built("build_wheel", checkout, tmp_path / "wheel", **environment)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"entropy_fast/py.typed", "entropy_fast/_native.pyi", "entropy_fast/kernels/token_logprobs.py"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"entropy_fast"}
    assert sum(name.startswith("entropy_fast/_native.") and name.endswith(".so") for name in names) == 1
    sources = {path.relative_to(checkout).as_posix() for path in (checkout / "entropy_fast").rglob("*.py")}
    assert sources <= set(names)
    script = (
        "import entropy_fast, entropy_fast._native as n; print(entropy_fast.__file__, n.build_info()['cuda_reason'])"
    )
    printed = python_says("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert printed == f"{tmp_path / 'site' / 'entropy_fast' / '__init__.py'} built with ENTROPY_FAST_CUDA=off\n"


@pytest.mark.slow
def test_source_distribution_is_complete(checkout: Path, tmp_path: Path) -> None:
    archive_path = built("build_sdist", checkout, tmp_path / "sdist")
    with tarfile.open(archive_path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "CMakeLists.txt",
        "LICENSE",
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "CITATION.cff",
        "SECURITY.md",
    }
    for folder in ("csrc", "kernels", "entropy_fast"):
        needed |= {path.relative_to(checkout).as_posix() for path in (checkout / folder).rglob("*.*") if path.is_file()}
    needed = {name for name in needed if "__pycache__" not in name and not name.endswith(".so")}
    assert needed <= names
    assert not any(name.endswith(".so") for name in names)
