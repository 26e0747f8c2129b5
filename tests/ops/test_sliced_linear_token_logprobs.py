"""linear_token_logprobs over a vocabulary spread over real processes, against the unsharded op in each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sliced_ranks
import torch.distributed

from entropy_fast import ops
from entropy_fast.errors import ConfigError

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch's gloo backend",
)

ALWAYS = ("float64", "narrow_dtypes", "parallelized_modules", "disagreements", "bytes_sent")
FURTHER = (
    "third_derivatives",
    "no_rows_on_the_last_rank",
    "impossible_tokens",
    "an_impossible_target",
    "rows_that_are_not_finite",
    "every_dtype",
    "subsets_of_results_and_gradients",
    "layouts_that_are_no_slices",
)
Found = list[dict[str, Any]]


def run_ranks(world: int, folder: Path, *checks: str) -> Found:
    """What each rank found."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, sliced_ranks.__file__, str(world), str(folder), *checks],
        env=environment,
        timeout=280,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_ranks(2, tmp_path_factory.mktemp("two"), *ALWAYS)


@pytest.fixture(scope="module", params=[2, 3])
def more(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    checks = FURTHER if request.param == 2 else ALWAYS + FURTHER
    return run_ranks(request.param, tmp_path_factory.mktemp("more"), *checks)


def assert_float64(found: dict[str, float], derivatives: int) -> None:
    for name, value in found.items():
        # A derivative more is two roundings more of numbers that are a few times as large.
        assert value <= (1e-12 if "derivative 3" in name else 1e-13), name
    assert sum("derivative" in name for name in found) == 3 * derivatives


def assert_always(ranks: Found) -> None:
    for found in ranks:
        assert_float64(found["float64"], 2)
        narrow = found["narrow_dtypes"]
        assert 0 < narrow["sliced"] <= 2 * narrow["whole"]
        assert all(value <= 1e-14 for value in found["parallelized_modules"].values())
        for name, (measured, expected) in found["bytes_sent"].items():
            assert expected <= measured <= 1.05 * expected, name
    # Every result is the same on all ranks to the last bit.
    assert len({found["narrow_dtypes"]["digest"] for found in ranks}) == 1


def assert_told(ranks: Found) -> None:
    """Everybody learns of it, and who it was of its own."""
    last = len(ranks) - 1
    differing = {
        "rows": "differ in rows (5 and 4)",
        "targets": "differ in targets;",
        "softcap": "differ in softcap;",
        "entropy": "differ in the wanted results;",
        "gradient": "differ in what needs a gradient;",
        "vocabulary": "differ in vocabulary (31 and 32)",
        "lost rows": "rows 30 to 31 of the vocabulary are on no rank",
        "doubled rows": f"of the vocabulary are on rank {last} and on another",
    }
    refused = {
        "a target": "expected a token in [0, 31)",
        "a backend": "does not have this op",
        "a dtype": "expected float32, float64",
    }
    for rank, found in enumerate(ranks):
        assert set(found["disagreements"]) == {*differing, *refused}
        for name, text in differing.items():
            message = found["disagreements"][name]
            assert message.startswith("DistributedError") and text in message
        for name, text in refused.items():
            expected = (
                text if rank == last else f"DistributedError: sliced_linear_token_logprobs: rank {last} of the group"
            )
            assert expected in found["disagreements"][name]


def test_two_processes(two: Found) -> None:
    assert_always(two)


def test_every_rank_is_told_of_a_disagreement(two: Found) -> None:
    assert_told(two)


def test_without_a_process_group() -> None:
    held = ops.VocabularySlice(torch.zeros(4, 3), 0, 4)
    with pytest.raises(ConfigError, match="not in the slice's process group"):
        ops.sliced_linear_token_logprobs(torch.zeros(1, 3), held, torch.zeros(1, dtype=torch.int64))


@pytest.mark.exhaustive
def test_more_of_it(more: Found) -> None:
    if len(more) > 2:
        assert_always(more)
        assert_told(more)
    for found in more:
        assert_float64(found["third_derivatives"], 3)
        assert_float64(found["no_rows_on_the_last_rank"], 2)
        assert_float64(found["impossible_tokens"], 2)
        assert all(value <= 1e-14 for value in found["an_impossible_target"].values())
        assert all(value <= 1e-14 for value in found["subsets_of_results_and_gradients"].values())
        for name, text in {
            "plain": "weight (11, 4), a plain Tensor; expected a DTensor that is split along the vocabulary",
            "whole": "placements (Replicate()) on",
            "hidden units": "placements (Shard(dim=1)) on",
            "fsdp": "Shard(dim=0)) on a mesh of (1, ",
            "bias": "bias (11,), a plain Tensor; expected both split along the vocabulary",
        }.items():
            assert found["layouts_that_are_no_slices"][name].startswith("ConfigError: VocabularySlice.from_dtensor got")
            assert text in found["layouts_that_are_no_slices"][name]


@pytest.mark.exhaustive
def test_models_that_transformers_made_parallel(tmp_path: Path) -> None:
    for found in run_ranks(2, tmp_path, "transformers_models"):
        assert len(found["transformers_models"]) > 40
        assert all(value <= 1e-5 for value in found["transformers_models"].values())
