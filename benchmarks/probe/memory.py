"""Peak memory of one call beyond model, optimizer and rollouts: ``python -m benchmarks.probe.memory``, a process for each."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from benchmarks.kernels.memory import bytes_from, peak_of_process
from benchmarks.probe.contenders import named
from benchmarks.probe.setting import build
from benchmarks.probe.workloads import Workload, small_like


def in_own_process(workload: Workload, contender: str, rollouts_file: Path | None) -> int:
    """Bytes by which the resident set grows at its peak, measured by a fresh interpreter with the same number of threads."""
    request = {
        "workload": dataclasses.asdict(workload),
        "contender": contender,
        "rollouts": None if rollouts_file is None else str(rollouts_file.resolve()),
    }
    return bytes_from("benchmarks.probe.memory", request, f"{contender} of {workload.name}")


def main(request: dict) -> int:
    """Print the number of bytes."""
    torch.set_num_threads(request["threads"])
    workload, contender = Workload(**request["workload"]), named(request["contender"])
    # Libraries loaded and threads started at the first call are not memory of the call.
    contender.run(build(small_like(workload)))
    setting = build(workload, None if request["rollouts"] is None else Path(request["rollouts"]))
    print(peak_of_process(lambda: contender.run(setting)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1])))
