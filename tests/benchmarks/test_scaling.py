"""The formulas of docs/scaling.md against what a rank sends, and the counting itself."""

from __future__ import annotations

import dataclasses

import own_benchmarks
import pytest
import torch.distributed as dist

own_benchmarks.make_importable(pytest.MonkeyPatch())  # for good: cases are named by what the module holds

from benchmarks import scaling  # noqa: E402
from benchmarks.scaling import WORKLOADS, Sizes, by_ranks, compared, predicted  # noqa: E402


def sizes(**changed: object) -> Sizes:
    known = Sizes(
        ranks=2,
        prompts=4,
        own=2,
        rows=8,
        columns=10,
        elements=1000,
        tensors=3,
        functionals=2,
        updates=1,
        parts=3,
        width=4,
        keeps=True,
        kept=1000,
        microbatches=2,
        backwards=3,
        layers=4,
        in_layers=800,
        elsewhere=200,
        vectors=10,
        tied=50,
        sharded=False,
    )
    return dataclasses.replace(known, **changed)  # type: ignore[arg-type]


def test_one_rank_sends_nothing():
    assert set(predicted(sizes(ranks=1)).values()) == {0.0}


def test_sums_are_sent_twice_and_gradients_of_units_once():
    found = predicted(sizes())
    assert found["gradient sums"] == 3 * 4 * 1000
    assert found["influence kernel"] == 3 * 4 * 2 * 1000 / 2 + 2 * 8 * (16 + 3)
    assert "influence kernel" not in predicted(sizes(keeps=False))


def test_of_a_sharded_model_layers_come_and_no_sums_are_added_up():
    found = predicted(sizes(sharded=True))
    assert "gradient sums" not in found
    assert found["gradients of units"] == 3 * 4 * 1050  # f C e n P, and tied ones twice
    # Of four layers 42 times: 4 in each of two trials and two scoring forwards, 12 in each of two microbatches, and twice more.
    assert found["layers"] == 42 * 0.5 * 4 * 800 / 4
    assert found["once"] == 0.5 * 4 * (200 + 30)


@pytest.mark.exhaustive
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend")
@pytest.mark.parametrize("workload", [*WORKLOADS[:3], *WORKLOADS[4:]], ids=lambda own: own.name)
def test_what_is_sent_is_what_the_formulas_say(tmp_path, workload):
    line = compared(workload, 2, by_ranks(workload, 2, tmp_path))
    for count in ("written",) if workload.sharded else ("counted", "written"):
        assert line[count] == pytest.approx(line["formula"], rel=scaling.ALLOWED)
    assert line["stored"] == line["stored_formula"] and line["same"]
