"""The machine: device, compilers, packages."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess

import torch

from benchmarks.gpu.process import run_as_stage
from benchmarks.gpu.rows import OK, SKIPPED, WRONG, RowWriter
from benchmarks.gpu.stages import NO_CUDA_DEVICE, Options
from benchmarks.kernels.machine import description

# Oldest version, where the rest of this command needs one.
PACKAGES = {
    "torch": (2, 11),
    "triton": (3, 2),
    "transformers": (4, 57),
    "peft": (0, 17),
    "safetensors": (),
    "numpy": (),
    "scipy": (),
    "rich": (),
    "pytest": (8, 2),
    "hypothesis": (),
    "setuptools": (77,),
    "pybind11": (2, 13),
}
BUILD_TOOLS = ("nvcc", "cmake", "ninja", "c++")
BUILD_PACKAGES = ("setuptools", "pybind11", "triton")  # a check on the CPU does without them
OPTIONAL = {
    "bitsandbytes": "quantised models are not tried",
    "liger-kernel": "a rival fewer",
    "cut-cross-entropy": "a rival fewer",
    "trl": "a rival fewer",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool_version(tool: str) -> str:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, timeout=30)
    lines = [line.strip() for line in done.stdout.splitlines() if re.search(r"\d\.\d|^\d+$", line)]
    return lines[0] if lines else "version unknown"


def _packages(rows: RowWriter, cuda: bool) -> None:
    for name, oldest in PACKAGES.items():
        needed = cuda or name not in BUILD_PACKAGES
        found = _version(name)
        wanted = ".".join(map(str, oldest))
        if found is None:
            rows.write(name, WRONG if needed else SKIPPED, "not installed")
        elif cuda and tuple(map(int, re.findall(r"\d+", found)[: len(oldest)])) < oldest:
            rows.write(name, WRONG, f"{wanted} or later is needed", {"found": found})
        else:
            rows.write(name, OK, values={"found": found})
    for name, without in OPTIONAL.items():
        found = _version(name)
        if found is None:
            rows.write(name, SKIPPED, f"not installed: {without}")
        else:
            rows.write(name, OK, values={"found": found})


def run(options: Options, rows: RowWriter) -> int:
    """Rows about the machine; a status of its own where there is no device."""
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        rows.write("device", SKIPPED, f"torch {torch.__version__} sees no CUDA device")
        return NO_CUDA_DEVICE
    with rows.row("device") as row:
        machine = description(options.device)
        gpu = machine.pop("gpu", None)
        row.values["found"] = str(machine["cpu"])
        if isinstance(gpu, dict):
            row.values["found"] = ", ".join(f"{key} {value}" for key, value in gpu.items())
            free, _ = torch.cuda.mem_get_info()
            row.values["free GiB"] = round(free / 2**30, 1)
    with rows.row("host") as row:
        row.values["found"] = ", ".join(
            f"{key} {machine[key]}" for key in ("cpu", "cores", "memory_gib", "system", "python", "commit")
        )
    for tool in BUILD_TOOLS:
        if shutil.which(tool) is None:
            rows.write(tool, WRONG if cuda else SKIPPED, "not on PATH")
            continue
        with rows.row(tool) as row:
            row.values["found"] = _tool_version(tool)
    _packages(rows, cuda)
    return 0


if __name__ == "__main__":
    run_as_stage(run)
