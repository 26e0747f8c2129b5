"""Several processes of one program, each a rank of a gloo group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(program: str, world: int, folder: Path, *arguments: str, timeout: float = 240) -> list[dict[str, Any]]:
    """What each rank wrote as JSON; the program is called with RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE and ``arguments``.

    All have to end by themselves and in order; what is left of them afterwards is killed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    results = [folder / f"rank{rank}.json" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(world), str(folder / "meet"), str(result), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {output[-3000:]}"
    return [json.loads(result.read_text()) for result in results]
