"""One binary on processors that are not here: older x86-64 ones, and aarch64, in QEMU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from every_op import EveryOp
from kernel_calls import logprob_calls
from kernel_drivers import CSRC, DRIVERS, REPOSITORY, compile_driver, run_image
from logprob_cases import DTYPES, make_case

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
    calls, results = tmp_path / "calls", tmp_path / "results"
    every_op = EveryOp()
    calls.write_bytes(every_op.image.file_content())
    done = _emulated(model, [str(calls), str(results)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == variant
    every_op.assert_right(every_op.image.results(results.read_bytes()))


@pytest.mark.slow
@needs_x86_emulator
def test_asking_for_more_than_the_processor_has_is_an_error(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.write_bytes(logprob_calls(make_case(1, 8, DTYPES[0])).image.file_content())
    done = _emulated("Nehalem", [str(calls), str(tmp_path / "results")], ENTROPY_FAST_ISA="avx512")
    assert done.returncode == 1
    assert "ENTROPY_FAST_ISA=avx512, which this processor cannot run; it can run baseline" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("qemu-aarch64", "aarch64-linux-gnu-g++"))),
    reason="needs qemu-aarch64 and aarch64-linux-gnu-g++",
)
def test_aarch64(tmp_path: Path) -> None:
    sources = [DRIVERS / "rows_driver.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    flags = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-DENTROPY_FAST_VARIANT=baseline")
    driver = compile_driver("aarch64-linux-gnu-g++", sources, tmp_path / "rows", *flags)
    every_op = EveryOp()
    command = ["qemu-aarch64", "-L", AARCH64_LIBRARIES, str(driver)]
    every_op.assert_right(run_image(command, every_op.image, tmp_path))
