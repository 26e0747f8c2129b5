"""The compiled module, with CUDA, into the source tree: no installation, no environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.gpu.process import run_as_stage
from benchmarks.gpu.rows import RowWriter
from benchmarks.gpu.stages import ROOT, Options

COMPILED = "compiled module"


def run(options: Options, rows: RowWriter) -> int:
    """Build, and see that a fresh interpreter finds every backend that a GPU should have."""
    backends = ("cuda", "triton")
    rows.plan([COMPILED, *(f"backend {name}" for name in backends)])
    with rows.row(COMPILED) as row:
        start = time.monotonic()
        # What it prints goes to the log.
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=ROOT,
            env=os.environ | {"ENTROPY_FAST_CUDA": "on"},
            check=False,
        )
        row.values["seconds"] = round(time.monotonic() - start, 1)
        if done.returncode:
            row.set("wrong", f"setup.py build_ext ended with {done.returncode}; its output is in the log")
    # Imported only now: what was there before may be another build.
    from entropy_fast import _native
    from entropy_fast.ops import backend_report

    records = {record.name: record for record in backend_report()}
    for name in backends:
        with rows.row(f"backend {name}") as row:
            if records[name].available:
                row.values["detail"] = records[name].detail
            else:
                row.set("wrong", records[name].reason)
    with rows.row("library") as row:
        row.values["detail"] = f"{_native.__file__}: {_native.build_info()}"
    return 0


if __name__ == "__main__":
    run_as_stage(run)
