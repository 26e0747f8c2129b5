"""Optimizers of sharded models (FSDP1 and FSDP2), as torch and accelerate save them, against the same training without shards.

Everything is in double precision and agrees bit by bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_states
import torch
import torch.distributed as dist

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import AdamState, adam_state_from_file

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"),
    pytest.mark.filterwarnings("ignore"),
]

WHOLE = ["fsdp2-full.pt", "fsdp1-flat-full.pt", "fsdp1-original-full.pt"]
FOLDERS = ["fsdp2", "fsdp1-flat", "fsdp1-original", "fsdp1-flat-dcp", "fsdp1-original-dcp"]
FLATTENED = ["fsdp2-flat", "fsdp1-flat-flat", "fsdp1-original-flat"]
OF_ACCELERATE = [
    f"{name}-accelerate-{kind}" for name in ("fsdp2", "fsdp1-flat", "fsdp1-original") for kind in ("full", "sharded")
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by one process, which is this."""
    folder = tmp_path_factory.mktemp("alone")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=0, world_size=1)
    try:
        sharded_states.write_fsdp2(folder)
        sharded_states.write_fsdp1(folder, original=False)
        sharded_states.write_fsdp1(folder, original=True)
    finally:
        dist.destroy_process_group()
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by two processes."""
    folder = tmp_path_factory.mktemp("together")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, sharded_states.__file__, str(rank), "2", str(folder / "meet"), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return folder


def assert_as_without_shards(path: Path, first_moments: bool = True) -> AdamState:
    model, optimizer = sharded_states.plain()
    live = AdamState.from_optimizer(optimizer, model)
    found = adam_state_from_file(path, sharded_states.Layers())
    assert found.moments.keys() == live.moments.keys()
    for name, expected in live.moments.items():
        own = found.moments[name]
        assert own.step == expected.step == sharded_states.STEPS
        assert found.groups[found.group_of[name]] == live.groups[live.group_of[name]], name
        assert torch.equal(own.second_moment, expected.second_moment), name
        if first_moments:
            assert own.first_moment is not None and expected.first_moment is not None
            assert torch.equal(own.first_moment, expected.first_moment), name
        else:
            assert own.first_moment is None
    return found


def test_by_order_the_shapes_would_fit_and_the_moments_be_anothers() -> None:
    """Else reading by order would pass for reading by name, or fail."""
    model, optimizer = sharded_states.plain()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    assert [p.shape for p in order] == [p.shape for p in model.parameters()]
    assert [id(p) for p in order] != [id(p) for p in model.parameters()]


@pytest.mark.parametrize("name", [*WHOLE, *FOLDERS])
def test_one_process(alone: Path, name: str) -> None:
    assert assert_as_without_shards(alone / name).notes == ()


@pytest.mark.parametrize("name", FLATTENED)
def test_one_process_flattened(alone: Path, name: str) -> None:
    (note,) = assert_as_without_shards(alone / name).notes
    assert "keeps settings by parameter and no groups" in note


@pytest.mark.parametrize("imported", [False, True])
def test_the_shards_of_one_rank_are_no_state(alone: Path, imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once torch.distributed.tensor is imported, torch loads a rank's piece, and it says that it has the whole's shape."""
    if not imported:
        monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda file: [])
    with pytest.raises(OptimizerStateError, match="one rank's pieces of a state that is sharded") as refusal:
        adam_state_from_file(alone / "fsdp2-shards.pt", sharded_states.Layers())
    assert "full_state_dict=True" in refusal.value.fix


def test_flattened_parameters_by_number_are_refused(alone: Path) -> None:
    with pytest.raises(OptimizerStateError, match=r"covers 4 parameters, the model has 8 .*they do not fit"):
        adam_state_from_file(alone / "fsdp1-flat-raw.pt", sharded_states.Layers())


def test_original_parameters_that_one_process_holds_whole_are_guessed_by_order(alone: Path) -> None:
    """``torch.save(optimizer.state_dict())`` has numbers alone; two processes have pieces, which do not fit."""
    found = adam_state_from_file(alone / "fsdp1-original-raw.pt", sharded_states.Layers())
    assert "order was guessed" in found.notes[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*WHOLE, *FOLDERS])
def test_two_processes(together: Path, name: str) -> None:
    assert assert_as_without_shards(together / name).notes == ()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FLATTENED)
def test_two_processes_flattened(together: Path, name: str) -> None:
    assert_as_without_shards(together / name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OF_ACCELERATE)
def test_two_processes_by_accelerate(together: Path, name: str) -> None:
    """Of original parameters and offloaded to the CPU that it was on, FSDP1 writes v under the name of m, too."""
    path = together / name / ("optimizer.bin" if name.endswith("full") else "optimizer_0")
    assert_as_without_shards(path, first_moments=name != "fsdp1-original-accelerate-full")


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("name", ["fsdp2", "fsdp1-flat", "fsdp1-original"])
def test_the_files_that_accelerate_writes_by_rank_are_refused(together: Path, name: str, rank: int) -> None:
    path = together / f"{name}-accelerate-ranks" / f"optimizer_0_rank{rank}.bin"
    with pytest.raises(OptimizerStateError, match="one rank's pieces of a state that is sharded"):
        adam_state_from_file(path, sharded_states.Layers())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["fsdp2-shards.pt", "fsdp1-flat-raw.pt", "fsdp1-original-raw.pt"])
def test_two_processes_and_pieces_of_one(together: Path, name: str) -> None:
    with pytest.raises(OptimizerStateError, match=r"one rank's pieces|they do not fit"):
        adam_state_from_file(together / name, sharded_states.Layers())
