"""What a stage's process begins with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.rows import RowWriter
from benchmarks.gpu.stages import Options


def run_as_stage(run: Callable[[Options, RowWriter], int | None]) -> None:
    """Call ``run`` with what the last argument of the command line says, and end with its exit status."""
    request = json.loads(sys.argv[-1])
    writer = RowWriter(Path(request["rows"]), request["stage"])
    raise SystemExit(run(Options(request["device"], request["size"]), writer) or 0)
