"""The CUDA kernels without a GPU: compiled for each architecture; run on host threads, also under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_drivers import DRIVERS, REPOSITORY, compile_driver, run_driver
from logprob_cases import DTYPES, Case, assert_right, make_case, special_rows

CSRC = REPOSITORY / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
NO_NVCC = "nvcc is not on PATH"
NO_CXX = "there is no g++ on PATH"

needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason=NO_CXX)


def _compile_simt(folder: Path, *flags: str) -> Path:
    # `#pragma unroll` means something to nvcc only.
    return compile_driver("g++", [DRIVERS / "simt_driver.cpp"], folder / "simt", "-Wno-unknown-pragmas", *flags)


@pytest.fixture(scope="module")
def simt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compile_simt(tmp_path_factory.mktemp("simt"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason=NO_NVCC)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_warning_or_spill(source: Path, tmp_path: Path) -> None:
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90, 100)]
    strict = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"]
    command = ["nvcc", "-std=c++17", "-O3", *architectures, *strict, "-c", str(source), "-o", str(tmp_path / "object")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_cxx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 31, 255, 256, 257, 1023, 1024, 1025, 5003])
def test_on_host_threads(simt: Path, vocabulary: int, dtype: torch.dtype, tmp_path: Path) -> None:
    case = make_case(3, vocabulary, dtype, padding=vocabulary % 4, masked=0.3, seed=vocabulary)
    assert_right(run_driver([str(simt)], case, tmp_path), case)


@needs_cxx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_rows_on_host_threads(simt: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    for case in (special_rows(17, dtype), special_rows(1500, dtype), make_case(2, 3000, dtype, offset=1e4)):
        assert_right(run_driver([str(simt)], case, tmp_path), case)


@needs_cxx
def test_targets_outside_the_vocabulary_give_nan(simt: Path, tmp_path: Path) -> None:
    case = Case(torch.zeros(2, 300), torch.tensor([300, -1]), torch.ones(2), torch.ones(2).double())
    outcome = run_driver([str(simt)], case, tmp_path)
    assert outcome.logprob.isnan().all()
    assert outcome.grad_logits.isnan().all()


def _sanitized(folder: Path, *flags: str) -> list[str]:
    """The command for a driver under ThreadSanitizer, which cannot cope with much address randomisation."""
    driver = _compile_simt(folder, "-fsanitize=thread", "-g", *flags)
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    return [*fixed_addresses, "env", "TSAN_OPTIONS=halt_on_error=1:exitcode=66", str(driver)]


@pytest.mark.slow
@needs_cxx
def test_no_data_race(tmp_path: Path) -> None:
    command = _sanitized(tmp_path)
    case = make_case(3, 700, torch.float32, masked=0.3)
    assert_right(run_driver(command, case, tmp_path, timeout=120), case)


@pytest.mark.slow
@needs_cxx
def test_a_missing_barrier_would_be_found(tmp_path: Path) -> None:
    # The same source with __syncthreads() taken out: if this passes the sanitizer, the test above proves nothing.
    command = _sanitized(tmp_path, "-DENTROPY_FAST_SIMT_WITHOUT_BARRIERS")
    with pytest.raises(AssertionError, match="ThreadSanitizer: data race"):
        run_driver(command, make_case(3, 700, torch.float32, masked=0), tmp_path, timeout=120)
