"""Peak memory of one call beyond its inputs, in a process of its own: ``python -m benchmarks.kernels.memory``."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.problem import Contender
from benchmarks.kernels.problems import build
from benchmarks.kernels.specs import Spec


def in_own_process(spec: Spec, contender: str, device: str) -> int:
    """Bytes, measured by a fresh interpreter with the same number of threads."""
    request = {"spec": dataclasses.asdict(spec), "contender": contender, "device": device}
    return bytes_from("benchmarks.kernels.memory", request, f"{contender} of {spec.label}")


def bytes_from(module: str, request: dict[str, Any], subject: str) -> int:
    """The number that ``python -m module`` prints last, given the request and this process's number of threads as JSON."""
    # Freed blocks go back to the system at once, so that the peak is of what is in use and not of what the allocator keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, "-m", module, json.dumps(request | {"threads": torch.get_num_threads()})]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{subject} failed in a process of its own:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _give_back_freed_memory() -> None:
    gc.collect()
    # With another C library, what was freed and kept counts as memory from before.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_of_process(call: Callable[[], object]) -> int:
    """Growth of the resident set at its peak. The results count: they are there when the peak is reached."""
    _give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, Linux alone
    before = _status("VmRSS")
    results = call()
    peak = _status("VmHWM")
    del results
    return max(0, peak - before)


def peak_of_cuda(contender: Contender) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = contender.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del results
    return peak - before


def _pick(spec: Spec, name: str, device: str) -> Contender:
    compiles = name in ("compiled", "cut-cross-entropy")
    return next(c for c in build(spec, device, compiles).contenders if c.name == name)


def main(request: dict) -> int:
    """Print the number of bytes."""
    torch.set_num_threads(request["threads"])
    spec, name, device = Spec(**request["spec"]), request["contender"], request["device"]
    # Libraries loaded and threads started at the first call are not memory of the op. What compiles compiles for one shape.
    _pick(spec.small(), name, device).run()
    contender = _pick(spec, name, device)
    if name in ("compiled", "cut-cross-entropy"):
        contender.run()
    print(peak_of_cuda(contender) if device == "cuda" else peak_of_process(contender.run))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1])))
