"""The CUDA kernels without a GPU: compiled for each architecture; run on host threads, also under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_calls import CHUNK, KINDS, accumulate_calls, accumulate_case, assert_accumulated, logprob_calls
from kernel_drivers import CSRC, DRIVERS, compile_driver, run_image
from logprob_cases import DTYPES, Case, Outcome, assert_right, make_case, shaped_rows, special_rows

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


def _outcome(
    command: list[str], case: Case, folder: Path, *, in_place: bool = False, misaligned: bool = False
) -> Outcome:
    calls = logprob_calls(case, in_place=in_place, misaligned=misaligned)
    return calls.outcome(run_image(command, calls.image, folder))


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
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
class TestTokenLogprobsOnHostThreads:
    # Around a thread's pack (2 to 8 elements), a block's (512 to 2048), and what a block loads at once (up to 4096).
    @pytest.mark.parametrize("vocabulary", [1, 31, 511, 513, 1025, 2047, 2049, 4095, 4096, 9001])
    def test_sizes(self, simt: Path, vocabulary: int, dtype: torch.dtype, entropy: bool, tmp_path: Path) -> None:
        # Where rows are a multiple of 16 bytes apart all of them take the vectorised path.
        padding = -vocabulary % 8 + 8 if vocabulary % 3 else vocabulary % 4
        case = make_case(3, vocabulary, dtype, padding=padding, masked=0.3, seed=vocabulary, entropy=entropy)
        assert_right(_outcome([str(simt)], case, tmp_path, in_place=vocabulary % 2 == 0), case)

    def test_special_rows(self, simt: Path, dtype: torch.dtype, entropy: bool, tmp_path: Path) -> None:
        cases = (
            special_rows(17, dtype, entropy=entropy),
            special_rows(6000, dtype, entropy=entropy),
            shaped_rows(5003, dtype, entropy=entropy),
            make_case(2, 6000, dtype, offset=1e4, entropy=entropy),
        )
        for case in cases:
            assert_right(_outcome([str(simt)], case, tmp_path), case)

    def test_alignment_and_place_change_no_bit(
        self, simt: Path, dtype: torch.dtype, entropy: bool, tmp_path: Path
    ) -> None:
        case = make_case(4, 5000, dtype, padding=8, entropy=entropy, masked=0.3)
        first = _outcome([str(simt)], case, tmp_path)
        assert_right(first, case)
        for in_place, misaligned in ((False, True), (True, False), (True, True)):
            other = _outcome([str(simt)], case, tmp_path, in_place=in_place, misaligned=misaligned)
            assert torch.equal(first.logprob, other.logprob) and torch.equal(first.lse, other.lse)
            assert torch.equal(first.grad_logits, other.grad_logits)
            assert first.entropy is None or other.entropy is None or torch.equal(first.entropy, other.entropy)


@needs_cxx
def test_targets_outside_the_vocabulary_give_nan(simt: Path, tmp_path: Path) -> None:
    upstream = (torch.ones(2), torch.ones(2).double(), torch.ones(2).double())
    case = Case(torch.zeros(2, 300), torch.tensor([300, -1]), *upstream)
    outcome = _outcome([str(simt)], case, tmp_path)
    assert outcome.entropy is not None
    assert all(part.isnan().all() for part in (outcome.logprob, outcome.lse, outcome.entropy, outcome.grad_logits))


@needs_cxx
@pytest.mark.parametrize("update", [True, False])
def test_precondition_accumulate_on_host_threads(simt: Path, update: bool, tmp_path: Path) -> None:
    case = accumulate_case(update=update)
    outcomes = []
    for misaligned in (False, True):
        calls = accumulate_calls(case, misaligned=misaligned)
        outcomes.append(calls.outcome(run_image([str(simt)], calls.image, tmp_path)))
        assert_accumulated(*outcomes[-1], case)
    assert torch.equal(outcomes[0][0], outcomes[1][0]), "alignment changed the dots"


@needs_cxx
def test_precondition_accumulate_of_more_chunks_than_threads(simt: Path, tmp_path: Path) -> None:
    case = accumulate_case((1, 300 * CHUNK + 5, 2), KINDS[1:2])
    calls = accumulate_calls(case)
    assert_accumulated(*calls.outcome(run_image([str(simt)], calls.image, tmp_path)), case)


@needs_cxx
def test_precondition_accumulate_without_tensors(simt: Path, tmp_path: Path) -> None:
    calls = accumulate_calls(accumulate_case(()))
    dots, _, _ = calls.outcome(run_image([str(simt)], calls.image, tmp_path))
    assert dots.shape == (0, 3)


def _sanitized(folder: Path, *flags: str) -> list[str]:
    """The command for a driver under ThreadSanitizer, which cannot cope with much address randomisation."""
    driver = _compile_simt(folder, "-fsanitize=thread", "-g", *flags)
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    return [*fixed_addresses, "env", "TSAN_OPTIONS=halt_on_error=1:exitcode=66", str(driver)]


RACE_CASE = {"rows": 3, "vocabulary": 700, "dtype": torch.float32, "entropy": True}


@pytest.mark.slow
@needs_cxx
def test_no_data_race(tmp_path: Path) -> None:
    command = _sanitized(tmp_path)
    case = make_case(**RACE_CASE, masked=0.3)
    for in_place in (False, True):
        assert_right(_outcome(command, case, tmp_path, in_place=in_place), case)
    sums = accumulate_case((0, 1, CHUNK + 1))
    calls = accumulate_calls(sums)
    assert_accumulated(*calls.outcome(run_image(command, calls.image, tmp_path)), sums)


@pytest.mark.slow
@needs_cxx
def test_a_missing_barrier_would_be_found(tmp_path: Path) -> None:
    # The same source with __syncthreads() taken out: if this passes the sanitizer, the test above proves nothing.
    command = _sanitized(tmp_path, "-DENTROPY_FAST_SIMT_WITHOUT_BARRIERS")
    images = [logprob_calls(make_case(**RACE_CASE, masked=0)).image, accumulate_calls(accumulate_case((9,))).image]
    for image in images:
        with pytest.raises(AssertionError, match="ThreadSanitizer: data race"):
            run_image(command, image, tmp_path)
