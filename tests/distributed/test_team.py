"""Several processes on one probe: the numbers of one process, and one clear error on all of them.

All processes are forked from one that has imported the libraries, job by job.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from process_groups import Done, assert_one_process, job, run_jobs
from rank_cases import CASES

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"
)

QUICK = ["parts_along_the_next_step", "second_sweep", "fewer_prompts_than_ranks"]
LAYERS = "many layers, no prompt for one"
PHASES = [
    "agreement",
    "scores",
    "entropy and direct and length and update and bonus",
    "gradient sums",
    "influence kernel",
    "tokens",
    "sequences",
    "result",
]
SINGLE_PRECISION = ("single_precision", "quantized_base")
SECONDS = 3.0
LONG = 30.0  # so that nobody who is killed is missed by the timeout alone


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, Done]:
    jobs = {
        "together": job(3, "together", names=QUICK),
        "raising": job(2, "raising", name="score_function", failing=1),
        "kill": job(3, "ending", name="score_function", phase="influence kernel", failing=2, how="kill", seconds=LONG),
        "other data": job(2, "other_data"),
        "rows": job(3, "spread_rows"),
        "looking late": job(2, "looking_late"),
        "layers": job(3, "fsdp2_ranks:sharded", names=[LAYERS]),
    }
    return dict(zip(jobs, run_jobs(tmp_path_factory.mktemp("jobs"), list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", QUICK)
def test_ranks_together_find_what_one_process_does(quick, name):
    assert_one_process(quick["together"], name)


def test_ranks_take_part_in_what_others_need_until_all_have_come(quick):
    assert_one_process(quick["layers"], LAYERS)


def test_who_fails_at_the_next_meeting_has_not_failed_at_this_one(quick):
    for found in quick["looking late"].ranks:
        assert found["reached"] == ["first"]
        assert found["error"] == "DistributedError" and found["ranks"] == [0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_case_at_every_world_size(tmp_path, world):
    (done,) = run_jobs(tmp_path, [job(world, "together", names=list(CASES))], timeout=900)
    for name in CASES:
        assert_one_process(done, name, narrow=name in SINGLE_PRECISION)


def test_a_rank_that_raises_ends_all_at_every_phase_and_the_next_probe_succeeds(quick):
    for written in quick["raising"].ranks:
        assert written is not None
        found = dict(written["found"])
        assert found.pop("good")["error"] is None and found.pop("good again")["error"] is None
        everywhere = found.pop("everywhere")
        assert (everywhere["error"], everywhere["text"]) == ("ValueError", "made up")  # as a single process says it
        assert set(found) == set(written["phases"]) >= {"agreement", "gradient sums", "influence kernel", "result"}
        for phase, said in found.items():
            assert said["error"] == "DistributedError" and said["ranks"] == [1]
            assert f"rank 1 failed at '{phase}': ValueError: made up." in said["text"]


def assert_ended(done: Done, failing: int, phase: str, seconds: float) -> None:
    left = [written for rank, written in enumerate(done.ranks) if rank != failing]
    texts = set()
    for written in left:
        assert written is not None and written["error"] == "DistributedError"
        assert written["ranks"] == [failing] and written["seconds"] < seconds
        texts.add(written["text"])
    (text,) = texts
    assert f"rank {failing} is gone or did not come" in text and f"(it was at '{phase}')" in text


def test_a_rank_that_is_killed_ends_all(quick):
    assert quick["kill"].statuses == [0, 0, -9]
    assert_ended(quick["kill"], 2, "influence kernel", LONG)


@pytest.mark.exhaustive
def test_a_rank_that_is_killed_at_any_phase_ends_all(tmp_path):
    jobs = [
        job(3, "ending", name="parts_along_the_next_step", phase=phase, failing=failing, how="kill", seconds=LONG)
        for place, phase in enumerate(PHASES)
        for failing in (place % 3, (place + 1) % 3)
    ]
    for done, own in zip(run_jobs(tmp_path, jobs, timeout=900), jobs, strict=True):
        failing: int = own["arguments"]["failing"]
        assert done.statuses == [-9 if rank == failing else 0 for rank in range(3)]
        assert_ended(done, failing, own["arguments"]["phase"], LONG)


@pytest.mark.exhaustive
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_whoever_stalls_is_named(tmp_path, failing):
    own = job(3, "ending", name="score_function", phase="gradient sums", failing=failing, how="stall", seconds=SECONDS)
    (done,) = run_jobs(tmp_path, [own])
    assert_ended(done, failing, "gradient sums", 10 * SECONDS)
    late = done.ranks[failing]
    assert late is not None and late["error"] == "DistributedError"  # it does not go on by itself either


@pytest.mark.exhaustive
def test_a_rank_that_does_not_make_the_call_is_named(tmp_path):
    (done,) = run_jobs(tmp_path, [job(3, "not_there", seconds=SECONDS)])
    for rank in (0, 2):
        written = done.ranks[rank]
        assert written is not None and written["ranks"] == [1]
        assert "rank 1 did not come to the probe within 3 s" in written["text"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rollouts", "rank 1 has other rollouts than rank 0"),
        ("options", "rank 1 has other options of the estimate than rank 0"),
        ("loss", "rank 1 has other coefficients of 'update' than rank 0"),
        ("parameters", "lora_A.default.weight' (1 of"),
    ],
)
def test_ranks_that_hold_something_else_are_named_before_anything_is_measured(quick, what, words):
    for written in quick["other data"].ranks:
        assert written is not None and written[what]["error"] == "DistributedError"
        assert words in written[what]["text"] and written[what]["ranks"] == [1]


def test_rows_that_are_spread_over_ranks_come_together_as_they_were(quick):
    found: list[dict[str, Any]] = [written for written in quick["rows"].ranks if written is not None]
    assert len(found) == 3
    for written in found:
        for name in ("advantages", "rewards"):
            assert written[name]["same"] and written[name]["tokens"]
            assert written[name]["number"] == sorted(written[name]["number"])
        together, alone = written["forecast"]
        assert together == pytest.approx(alone, rel=1e-10)
        assert written["local ids"][0] == "RolloutsError" and "same group id" in written["local ids"][1]
