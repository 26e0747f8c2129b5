"""Gradients that change hands layer by layer, and what else ranks do without keeping step; by real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parted_ranks
import pytest
import torch
import torch.distributed as dist
from process_groups import job, run_jobs

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"
)


def assert_everything_arrived(ranks: list[dict[str, Any] | None], *, sums: bool, together: bool) -> None:
    names = [str(place) for place in range(len(parted_ranks.SHAPES))]
    units = [number for groups in parted_ranks.GROUPS for group in groups for number in group]
    assert {name for rank in ranks if rank for name in rank["kept"]} == set(names)
    for rank in ranks:
        assert rank is not None and rank["kept"]
        expected: dict[str, Any] = {}
        for number in units:
            for name in rank["kept"]:
                if parted_ranks.SKIPPED.get(number) == int(name):
                    continue
                for column in range(parted_ranks.COLUMNS):
                    key = f"{-1 if sums else number}/{column}/{name}"
                    own = parted_ranks.gradient_of(number, column, int(name))
                    start, stop = rank["kept"][name]
                    own = own[start:stop] if own.dim() > 1 else own
                    expected[key] = expected.get(key, 0) + own
        assert rank["total"].keys() == expected.keys()
        for key, own in expected.items():
            assert torch.equal(torch.tensor(rank["total"][key], dtype=torch.float64), own), key
        if together:
            groups = [group for own in parted_ranks.GROUPS for group in own]
            assert sorted(rank["calls"]) == sorted(groups)


def test_what_ranks_ask_for_is_done_by_all_in_one_order_and_gradients_arrive_once(tmp_path: Path) -> None:
    ways = [(False, False), (True, False), (False, True)]
    jobs = [job(3, "parted_ranks:asking")]
    jobs += [job(3, "parted_ranks:handing_over", sums=sums, together=together) for sums, together in ways]
    asked, *handed = run_jobs(tmp_path, jobs)
    for done, (sums, together) in zip(handed, ways, strict=True):
        assert_everything_arrived(done.ranks, sums=sums, together=together)

    first, second = asked.ranks[0]["firsts"] if asked.ranks[0] else (0, 0)
    assert (first, second) == (0, 2)
    orders = []
    for number, rank in enumerate(asked.ranks):
        assert rank is not None
        orders.append([[kind, thing] for kind, thing, _, _ in rank["done"]])
        mine = [(first if kind == "first" else second) + thing for kind, thing, mine, _ in rank["done"] if mine]
        assert mine == rank["wanted"]
        for _, _, mine, details in rank["done"]:
            assert (details[number] == [number, 10 + number, -1]) is mine
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) >= 4
