"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in every instruction set of this machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_op import EveryOp
from kernel_calls import logprob_calls
from kernel_drivers import REPOSITORY, CallImage
from logprob_cases import make_case

from entropy_fast import _native

pybind11 = pytest.importorskip("pybind11", reason="building the library needs pybind11")
# The build's tools come with the development extra, next to the interpreter.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
BUILD = REPOSITORY / "build" / f"sanitized-{sys.implementation.cache_tag}"
RUNNER = REPOSITORY / "tests" / "_support" / "native_emulated.py"


def _which(name: str) -> str | None:
    return shutil.which(name, path=SEARCH)


def _library_of_compiler(name: str) -> str:
    """Where g++ keeps a library of its own; the bare name where it has none."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _why_not() -> str:
    missing = [name for name in ("cmake", "ninja", "g++") if _which(name) is None]
    if missing:
        return f"not on PATH: {', '.join(missing)}"
    absent = [name for name in ("libasan.so", "libubsan.so") if not Path(_library_of_compiler(name)).is_absolute()]
    return f"g++ has no {', '.join(absent)}" if absent else ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "can run")]


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """The library, built with both sanitizers in a folder of its own, which is kept."""
    configure = [
        *("cmake", "-S", str(REPOSITORY), "-B", str(BUILD), "-G", "Ninja"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD / 'module'}",
        *("-DCMAKE_CXX_COMPILER=g++", "-DCMAKE_BUILD_TYPE=Debug"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DENTROPY_FAST_CUDA=off",
        "-DENTROPY_FAST_SANITIZE=ON",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    # Another worker of the same test run may be building it.
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(BUILD)]):
            environment = {**os.environ, "PATH": SEARCH}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    (module,) = (BUILD / "module").glob("_native*")
    return module


def _run(
    module: Path, image: CallImage, folder: Path, *, variant: str = "", threads: int = 1
) -> tuple[subprocess.CompletedProcess[str], Path]:
    calls, results = folder / "calls", folder / "results"
    calls.write_bytes(image.file_content())
    environment = {
        **os.environ,
        # Into an interpreter that knows nothing of sanitizers; libstdc++ so that exceptions are seen as they are thrown.
        "LD_PRELOAD": f"{_library_of_compiler('libasan.so')} {_library_of_compiler('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ENTROPY_FAST_ISA": variant,
    }
    command = [sys.executable, "-I", str(RUNNER), str(module), str(calls), str(results), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    return done, results


@pytest.mark.parametrize("variant", _native.supported_variants())
def test_no_report(sanitized: Path, variant: str, tmp_path: Path) -> None:
    every_op = EveryOp(guard=0)
    done, results = _run(sanitized, every_op.image, tmp_path, variant=variant, threads=2)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.strip() == variant
    every_op.assert_right(every_op.image.results(results.read_bytes()))


def test_an_element_too_many_would_be_found(sanitized: Path, tmp_path: Path) -> None:
    # The memory of one row ends an element early: if this passes the sanitizer, the test above proves nothing.
    calls = logprob_calls(make_case(1, 33, torch.float32, masked=0), CallImage(guard=0))
    logits = next(index for index, blob in enumerate(calls.image.blobs) if len(blob) == 33 * 4)
    calls.image.blobs[logits] = calls.image.blobs[logits][:-4]
    done, _ = _run(sanitized, calls.image, tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "forward_row" in done.stderr


def test_undefined_behaviour_would_be_found(sanitized: Path, tmp_path: Path) -> None:
    image = CallImage(guard=0)
    calls = logprob_calls(make_case(1, 33, torch.float32, masked=0), image)
    # A float at an odd address.
    image.blobs[0] = b"\xff" + image.blobs[0]
    image.relocations = [(*at, blob, offset + (blob == 0)) for *at, blob, offset in image.relocations]
    done, _ = _run(sanitized, calls.image, tmp_path)
    assert done.returncode != 0
    assert "runtime error: load of misaligned address" in done.stderr
