"""Call files: how a case gets to a kernel in another program, and its results back (tests/ops/drivers/call_file.h)."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from logprob_cases import IGNORE, Case, Outcome, accumulator
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVERS = REPOSITORY / "tests" / "ops" / "drivers"
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def write_call(case: Case, path: Path) -> None:
    rows, vocabulary = case.logits.shape
    stride = max(case.logits.stride(0), vocabulary)
    storage = torch.full((rows, stride), float("nan"), dtype=case.logits.dtype)
    storage[:, :vocabulary] = case.logits
    header = struct.pack("=5q", ELEMENT_TYPES[case.logits.dtype], rows, vocabulary, stride, IGNORE)
    parts = [storage, case.targets, case.grad_logprob, case.grad_lse]
    path.write_bytes(header + b"".join(_bytes(part) for part in parts))


def read_results(case: Case, path: Path) -> Outcome:
    rows, vocabulary = case.logits.shape
    data = bytearray(path.read_bytes())
    scalar = accumulator(case.logits.dtype)
    logprob = torch.frombuffer(data, dtype=scalar, count=rows)
    offset = rows * scalar.itemsize
    lse = torch.frombuffer(data, dtype=torch.float64, count=rows, offset=offset)
    offset += rows * 8
    grad = torch.frombuffer(data, dtype=case.logits.dtype, count=rows * vocabulary, offset=offset)
    return Outcome(logprob, lse, grad.view(rows, vocabulary))


def run_driver(command: Sequence[str], case: Case, folder: Path, timeout: float = 120) -> Outcome:
    """The results of ``command CALL RESULTS``; a failure or a hang of the program is one of the test."""
    call, results = folder / "call", folder / "results"
    write_call(case, call)
    done = subprocess.run(
        [*command, str(call), str(results)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return read_results(case, results)


def compile_driver(compiler: str, sources: Sequence[Path], output: Path, *flags: str) -> Path:
    includes = ["-I", str(REPOSITORY / "csrc"), "-I", str(DRIVERS)]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *includes, *flags]
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(output), "-pthread"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return output
