"""Ranks that are ended before their time: each goes on from where it was, and all get what they would have got."""

from __future__ import annotations

import pytest
import resumed_ranks
import torch.distributed
from process_groups import job, run_jobs

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="needs torch's gloo backend",
    ),
]


@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("name", resumed_ranks.CASES)
def test_all_ranks_go_on(tmp_path, name, how):
    world, jobs = 2, []
    places = (1, 4, 5, 8)
    for at in places:
        folder = str(tmp_path / f"kept {at}")
        jobs += [
            job(world, "ended", name=name, folder=folder, failing=at % 2, at=at, how=how),
            job(world, "resumed", name=name, folder=folder),
        ]
    (tmp_path / "work").mkdir()
    done = run_jobs(tmp_path / "work", jobs, timeout=900, script=resumed_ranks.__file__)
    for at, first, second in zip(places, done[::2], done[1::2], strict=True):
        failing = at % 2
        assert (first.ranks[failing] is None) == (how == "kill")
        assert first.ranks[1 - failing]["error"] == "DistributedError", at
        assert second.statuses == [0] * world
        for found in second.ranks:
            assert found["found"] == found["expected"], at
            # A pass of the two-pass engine writes after its report, so a rank that raises at its first one leaves nothing.
            nothing = (name, how, at) == ("two passes", "raise", 1)
            assert found["parts"] == ["rank-0-of-2", "rank-1-of-2"][: 1 if nothing else 2] and not found["left"]
            (note,) = found["notes"]
            assert "rank 0" in note and "rank 1" in note
        assert second.ranks[0]["notes"] == second.ranks[1]["notes"]
