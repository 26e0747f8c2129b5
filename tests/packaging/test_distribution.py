"""What is installed and shipped, and what importing from a checkout finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from kernel_drivers import REPOSITORY

import entropy_fast
from entropy_fast import _native


def _python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        # The build's tools come with the development extra, next to the interpreter.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    printed = _python("-c", "import kernels; print(kernels.origin)", cwd=REPOSITORY, PYTHONPATH=str(tmp_path))
    assert printed == "another package\n"
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_everything_is_found_from_the_root_of_a_checkout() -> None:
    # `python -m benchmarks.x` imports entropy_fast from the working directory.
    script = (
        "import entropy_fast, entropy_fast._native, entropy_fast.kernels as k; print(entropy_fast.__file__, k.__file__)"
    )
    package, kernels = _python("-c", script, cwd=REPOSITORY).split()
    assert Path(package) == REPOSITORY / "entropy_fast" / "__init__.py"
    assert Path(kernels).parent.name == "kernels"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without what earlier builds left, so that nothing of this machine's build is shipped by accident."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "entropy_fast", "kernels"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for pattern in ("*.py", "*.toml", "*.txt", "*.in", "*.md", "LICENSE", "Makefile", ".clang-format"):
        for file in REPOSITORY.glob(pattern):
            shutil.copy(file, folder / file.name)
    return folder


def _backend(call: str, checkout: Path, output: Path, **environment: str) -> Path:
    """The file that a call of the build backend leaves in ``output``, with the tools of this environment."""
    for module in ("pybind11", "setuptools"):
        pytest.importorskip(module, reason="building needs it")
    output.mkdir()
    _python(
        "-c", f"import sys, setuptools.build_meta as b; b.{call}(sys.argv[1])", str(output), cwd=checkout, **environment
    )
    (built,) = output.iterdir()
    return built


@pytest.mark.slow
def test_wheel(checkout: Path, tmp_path: Path) -> None:
    # What is shipped, not how fast it is: without optimisation the kernels compile ten times as fast.
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/bash\nexec "${@/#-O3/-O0}"\n')
    launcher.chmod(0o755)
    environment = {"ENTROPY_FAST_CUDA": "off", "CMAKE_CXX_COMPILER_LAUNCHER": str(launcher)}
    wheel = _backend("build_wheel", checkout, tmp_path / "wheel", **environment)
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
    printed = _python("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert printed == f"{tmp_path / 'site' / 'entropy_fast' / '__init__.py'} built with ENTROPY_FAST_CUDA=off\n"


@pytest.mark.slow
def test_source_distribution_is_complete(checkout: Path, tmp_path: Path) -> None:
    archive_path = _backend("build_sdist", checkout, tmp_path / "sdist")
    with tarfile.open(archive_path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "setup.py", "pyproject.toml", "constraints.txt"}
    for folder in ("csrc", "kernels", "entropy_fast"):
        needed |= {path.relative_to(checkout).as_posix() for path in (checkout / folder).rglob("*.*") if path.is_file()}
    needed = {name for name in needed if "__pycache__" not in name and not name.endswith(".so")}
    assert needed <= names
    assert not any(name.endswith(".so") for name in names)
