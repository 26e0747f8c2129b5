"""What the build decides about CUDA, by configuring it (nothing is compiled)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_drivers import REPOSITORY

pybind11 = pytest.importorskip("pybind11", reason="configuring the build needs pybind11")
# The build's tools come with the development extra, next to the interpreter.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
ENVIRONMENT = {**os.environ, "PATH": SEARCH}


def _which(name: str) -> str | None:
    return shutil.which(name, path=SEARCH)


pytestmark = [
    pytest.mark.skipif(not all(map(_which, ("cmake", "ninja", "c++"))), reason="needs cmake, ninja and a C++ compiler"),
]


@pytest.fixture
def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH holds the tools of the build, and no CUDA compiler."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "c++", "g++", "gcc", "cc", "ld", "ar", "ranlib", "as", "sh", "uname"):
        found = _which(name)
        if found:
            (tools / name).symlink_to(found)
    hidden = ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "CUDA_ROOT", "ENTROPY_FAST_CUDA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**environment, "PATH": str(tools)}


def _configure(folder: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    # The program is looked up here, for subprocess would search the PATH of the test, not that of `environment`.
    command = [
        *(
            shutil.which("cmake", path=environment["PATH"]) or "cmake",
            "--fresh",
            "-S",
            str(REPOSITORY),
            "-B",
            str(folder),
            "-G",
            "Ninja",
        ),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def _header(folder: Path) -> str:
    return (folder / "generated" / "build_info.h").read_text()


def test_insisting_on_cuda_without_a_compiler_says_what_to_install(
    without_nvcc: dict[str, str], tmp_path: Path
) -> None:
    done = _configure(tmp_path / "build", without_nvcc, "-DENTROPY_FAST_CUDA=on")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "ENTROPY_FAST_CUDA=on, but no CUDA compiler was found" in message
    assert "Install the CUDA toolkit" in message
    assert "ENTROPY_FAST_CUDA=off" in message


def test_a_missing_compiler_is_recorded(without_nvcc: dict[str, str], tmp_path: Path) -> None:
    done = _configure(tmp_path / "build", without_nvcc)
    assert done.returncode == 0, done.stderr
    assert "#define ENTROPY_FAST_WITH_CUDA 0" in _header(tmp_path / "build")
    assert "no CUDA compiler was found when entropy_fast was built" in _header(tmp_path / "build")


def test_a_compiler_installed_later_is_found(without_nvcc: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        # A CUDA toolkit is optional; without one there is no compiler to be found later.
        pytest.skip("nvcc is not on PATH")
    assert _configure(tmp_path / "build", without_nvcc).returncode == 0
    done = _configure(tmp_path / "build", ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    header = _header(tmp_path / "build")
    assert "#define ENTROPY_FAST_WITH_CUDA 1" in header
    assert '"80-real;90-real;100-real;100-virtual"' in header


def test_switched_off_is_recorded(tmp_path: Path) -> None:
    done = _configure(tmp_path / "build", ENVIRONMENT, "-DENTROPY_FAST_CUDA=off")
    assert done.returncode == 0, done.stderr
    assert "#define ENTROPY_FAST_WITH_CUDA 0" in _header(tmp_path / "build")
    assert "built with ENTROPY_FAST_CUDA=off" in _header(tmp_path / "build")


def test_nonsense_is_refused(tmp_path: Path) -> None:
    done = _configure(tmp_path / "build", ENVIRONMENT, "-DENTROPY_FAST_CUDA=maybe")
    assert done.returncode != 0
    assert "ENTROPY_FAST_CUDA is 'maybe'" in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("nm") is None, reason="x86-64 with nm only")
@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw")])
@pytest.mark.parametrize(
    "source", ["token_logprobs_rows.cpp", "softmax_block_rows.cpp", "precondition_accumulate_chunks.cpp"]
)
def test_wide_builds_share_no_function_with_the_rest(source: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    # A symbol that two translation units define is merged by the linker: it could keep the AVX-512 copy for everyone.
    built = tmp_path / "rows.o"
    path = REPOSITORY / "csrc" / "cpu" / source
    command = ["c++", "-std=gnu++17", "-O0", "-fPIC", *flags, "-DENTROPY_FAST_VARIANT=avx2", "-c", str(path)]
    subprocess.run([*command, "-o", str(built)], check=True, timeout=120)
    listed = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(built)], capture_output=True, text=True, check=True
    )
    visible = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines() if line.split()[1].isupper()]
    assert visible
    assert all(kind == "T" and name.startswith("entropy_fast::cpu::avx2::") for kind, name in visible), visible
