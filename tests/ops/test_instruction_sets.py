"""One binary on processors that are not here: older x86-64 ones, and aarch64, in QEMU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_drivers import DRIVERS, REPOSITORY, compile_driver, read_results, run_driver, write_call
from logprob_cases import DTYPES, assert_right, make_case, special_rows

from entropy_fast import _native

AARCH64_LIBRARIES = "/usr/aarch64-linux-gnu"
EMULATED = REPOSITORY / "tests" / "_support" / "native_emulated.py"


def _emulated(model: str, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    # The environment's own thread and instruction set choices do not belong to the emulated machine.
    inherited = {name: value for name, value in os.environ.items() if name != "ENTROPY_FAST_ISA"}
    interpreter = Path(sys.executable).resolve()
    command = ["qemu-x86_64", "-cpu", model, str(interpreter), "-I", str(EMULATED), _native.__file__, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**inherited, **environment}, check=False
    )


needs_x86_emulator = pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None or platform.machine() != "x86_64", reason="needs qemu-x86_64 on x86-64"
)


@pytest.mark.slow
@needs_x86_emulator
@pytest.mark.parametrize(("model", "variant"), [("Nehalem", "baseline"), ("Haswell", "avx2")])
def test_older_processors_run_what_they_can(model: str, variant: str, tmp_path: Path) -> None:
    call, results = tmp_path / "call", tmp_path / "results"
    for dtype in DTYPES:
        case = make_case(4, 1100, dtype, padding=2)
        write_call(case, call)
        done = _emulated(model, [str(call), str(results)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == variant
        assert_right(read_results(case, results), case)


@pytest.mark.slow
@needs_x86_emulator
def test_asking_for_more_than_the_processor_has_is_an_error(tmp_path: Path) -> None:
    call = tmp_path / "call"
    write_call(make_case(1, 8, DTYPES[0]), call)
    done = _emulated("Nehalem", [str(call), str(tmp_path / "results")], ENTROPY_FAST_ISA="avx512")
    assert done.returncode == 1
    assert "ENTROPY_FAST_ISA=avx512, which this processor cannot run; it can run baseline" in done.stderr


@pytest.mark.skipif(
    not all(map(shutil.which, ("qemu-aarch64", "aarch64-linux-gnu-g++"))),
    reason="needs qemu-aarch64 and aarch64-linux-gnu-g++",
)
def test_aarch64(tmp_path: Path) -> None:
    sources = [DRIVERS / "rows_driver.cpp", REPOSITORY / "csrc" / "cpu" / "token_logprobs_rows.cpp"]
    flags = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-DENTROPY_FAST_VARIANT=baseline")
    driver = compile_driver("aarch64-linux-gnu-g++", sources, tmp_path / "rows", *flags)
    command = ["qemu-aarch64", "-L", AARCH64_LIBRARIES, str(driver)]
    for dtype in DTYPES:
        for case in (make_case(5, 2011, dtype, padding=1), make_case(2, 1, dtype), special_rows(1500, dtype)):
            assert_right(run_driver(command, case, tmp_path), case)
