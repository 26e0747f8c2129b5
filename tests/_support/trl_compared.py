"""What two processes of a training have logged and forecast, held against what one has."""

from __future__ import annotations

import math
from typing import Any

from process_groups import Done

CLOCKED = ("seconds", "share_of_training")
SINGLE_PRECISION = 1e-4  # of the largest number of its kind: models are in fp32, and the order of sums is another


def assert_one_forecast(alone: Done, together: Done) -> None:
    """The same numbers on both ranks, and those of one process."""
    (one,), ranks = alone.ranks, together.ranks
    assert one is not None and ranks[0] is not None and ranks[1] is not None
    for own in (one, *ranks):
        assert own is not None and own["same weights"] and own["same draws"] and not own["warnings"]
    # Of what clocks say the first rank's, on both.
    assert ranks[0]["forecasts"] == ranks[1]["forecasts"]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    # Trainers shuffle their own rows, so that the order is another.
    assert [sorted(of_step) for of_step in one["prompts"]] == [sorted(of_step) for of_step in ranks[0]["prompts"]]
    assert len(one["prompts"]) == 4 and ranks[0]["prompts"] == ranks[1]["prompts"]
    for agreed in ranks[0]["agreement"]:
        assert agreed is None or (agreed[0] > 1 - 1e-6 and abs(agreed[1] - 1) < 1e-4)
    assert any(agreed is not None for agreed in ranks[0]["agreement"])
    assert_alike(one["forecasts"], ranks[0]["forecasts"])
    ours, theirs = ([logged(row) for row in found["logs"][:-1]] for found in (one, ranks[0]))
    assert_alike(ours, theirs)
    assert any(key.startswith("entropy_fast/") for key in theirs[0])


def logged(row: dict[str, Any]) -> dict[str, Any]:
    """Ours, and what shows that the trainings are one; the trainer's own entropy is a mean of micro-batches' means."""
    return {key: row[key] for key in row if key.startswith("entropy_fast/") or key in ("grad_norm", "reward")}


def assert_alike(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    assert len(expected) == len(found)
    for name in expected[0]:
        if name.endswith(CLOCKED):
            continue
        ours, theirs = ([row.get(name) for row in rows] for rows in (expected, found))
        assert [value is None for value in ours] == [value is None for value in theirs], name
        largest = max((abs(value) for value in ours if value is not None), default=0.0)
        for a, b in zip(ours, theirs, strict=True):
            if a is not None:
                assert math.isclose(a, b, rel_tol=0, abs_tol=SINGLE_PRECISION * largest), (name, ours, theirs)
