"""DistributedDataParallel: every rank probes its own rollouts, nothing is averaged, and training goes on as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import distributed_probe
import pytest
import torch.distributed

WORLD = 2

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch's gloo backend",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    results = [folder / f"rank{rank}.json" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, distributed_probe.__file__, str(rank), str(WORLD), str(folder / "meet"), str(result)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [json.loads(result.read_text()) for result in results]


def test_each_rank_gets_its_own_result(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["wrapped"] == found["unwrapped"]
        assert found["alpha"] == pytest.approx(found["unwrapped"][2:], rel=1e-4)
        # The engines agree as fp32 does; the wrapper changes no bit of either.
        assert found["one_pass"] == found["one_pass_unwrapped"]
        assert found["one_pass"] == pytest.approx(found["unwrapped"], rel=1e-4)
    assert ranks[0]["wrapped"] != ranks[1]["wrapped"]


def test_the_probe_reduces_nothing(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["reductions_in_probe"] == 0
        assert found["sync_flags_in_probe"] == [False]
        assert found["reductions_at_the_end"] == found["reductions_in_training"]


def test_training_still_synchronises(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["sync_flag"] is True
        assert found["reductions_in_training"] > 0
        assert found["gradients_agree"] is True
        assert found["wrapped_after_training"] == found["unwrapped"]
        assert found["one_pass_after_training"] == found["one_pass"]
