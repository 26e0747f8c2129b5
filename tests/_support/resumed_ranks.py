"""Probes by several ranks that are ended before their time; started by `process_groups.run_jobs` as `ranks_at_work` is."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from probe_models.batches import make_rollouts
from rank_cases import SIZES, probing, wide_model
from ranks_at_work import MODES, attempt, digest, main, numbers

PARTS = {"entropy_estimator": "rao_blackwell", "baseline": "prompts", "step": "next", "prompts_per_microbatch": 1}
CASES: dict[str, dict[str, Any]] = {
    "kept": {**PARTS, "by_sequence": True, "by_token": True},
    "not kept": {**PARTS, "memory_budget": 0},
    "two passes": {**PARTS, "engine": "two_pass"},
}


def options_with(name: str, folder: str) -> dict[str, Any]:
    return {**CASES[name], "checkpoint": folder, "checkpoint_seconds": 0}


def ended(rank: int, name: str, folder: str, failing: int, at: int, how: str) -> dict[str, Any]:
    """One rank is killed, or raises, at a report of progress."""
    seen = 0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if rank == failing and seen == at:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("made up")

    fields = {"on_progress": report}
    return attempt(probing(wide_model(), make_rollouts(SIZES), fields=fields, **options_with(name, folder)))


def resumed(rank: int, name: str, folder: str) -> dict[str, Any]:
    """The same call again, beside one that nothing ended."""
    expected = probing(wide_model(), make_rollouts(SIZES), **CASES[name])("all")
    before, reports = sorted(path.name for path in Path(folder).glob("rank-*")), []
    fields = {"on_progress": lambda *seen: reports.append(seen)}
    found = probing(wide_model(), make_rollouts(SIZES), fields=fields, **options_with(name, folder))("all")
    return {
        "expected": digest(dict(numbers(expected))),
        "found": digest(dict(numbers(found))),
        "parts": before,
        "reports": len(reports),
        "notes": [note for note in found.diagnostics.warnings if "went on" in note],
        "left": Path(folder).exists(),
    }


MODES |= {own.__name__: own for own in (ended, resumed)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
