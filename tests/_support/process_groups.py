"""Start `ranks_at_work`, and read what its processes wrote."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ranks_at_work


@dataclasses.dataclass(frozen=True)
class Done:
    """What a job came to.

    Attributes:
        statuses: exit status of every rank.
        ranks: what every rank wrote; None where it wrote nothing.
    """

    statuses: list[int]
    ranks: list[dict[str, Any] | None]


def job(world: int, mode: str, **arguments: Any) -> dict[str, Any]:
    return {"world": world, "mode": mode, "arguments": arguments}


def run_jobs(
    folder: Path, jobs: Sequence[dict[str, Any]], timeout: float = 300, script: str = ranks_at_work.__file__
) -> list[Done]:
    """Jobs one after the other by a script that starts them; the libraries are imported once for all of them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, str(folder), json.dumps(list(jobs))],
        env=environment,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = []
    for number, own in enumerate(jobs):
        files = [folder / str(number) / f"rank{rank}.json" for rank in range(own["world"])]
        written = [json.loads(file.read_text()) if file.exists() else None for file in files]
        statuses = json.loads((folder / str(number) / "statuses.json").read_text())
        if any(status == 1 for status in statuses):
            raise AssertionError(done.stdout[-5000:])
        found.append(Done(statuses, written))
    return found


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A launcher with so many processes of what follows ``python``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def assert_one_process(done: Done, name: str, *, narrow: bool = False) -> None:
    """The same bits on all ranks, and the numbers of one process to rounding: of fp64, or of fp32 where they are ``narrow``."""
    first = done.ranks[0]
    assert first is not None
    for other in done.ranks:
        assert other is not None
        assert {key: other[name][key] for key in ("digest", "plan", "warnings")} == {
            key: first[name][key] for key in ("digest", "plan", "warnings")
        }
    found, expected = first[name]["all"], first[name]["own"]
    assert found.keys() == expected.keys()
    if narrow:
        # Sums in which terms cancel have no more than the terms' digits: the kernel and its sums are compared as vectors.
        for place in (".kernel", ".diagonal", ".row_sums", ".column_sums", ".x_dot_y"):
            assert math.dist(found[place], expected[place]) <= 1e-6 * math.hypot(*expected[place]), place
        return
    for place, values in expected.items():
        # A difference has no more than the digits of what it is the difference of.
        beside = [*values, *expected.get(place.replace(".compared.", ".updates."), ())]
        size = max((abs(value) for value in beside if math.isfinite(value)), default=0.0)
        for mine, theirs in zip(found[place], values, strict=True):
            both_unknown = math.isnan(mine) and math.isnan(theirs)
            assert both_unknown or abs(mine - theirs) <= 1e-10 * size, (place, mine, theirs)
