"""When a checkpoint is written, how large it is, and what of it is written again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from ended_probes import CASES, SIZES, EndedError, probe
from rank_cases import wide_model
from safetensors.torch import load_file

from entropy_fast.distributed import Team
from entropy_fast.errors import ResumeError
from entropy_fast.resuming import FolderKeeper, Held, Keeper, Tables
from entropy_fast.resuming import folder as folder_module
from entropy_fast.resuming.folder import CheckpointFolder

IDENTITY = {"version": "1"}


class Clock:
    """That goes on when it is told, and while sums are written."""

    def __init__(self) -> None:
        self.now, self.while_writing = 0.0, 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found, real = Clock(), CheckpointFolder.write_sums

    def slowly(self, *arguments):
        found.now += found.while_writing
        return real(self, *arguments)

    monkeypatch.setattr(CheckpointFolder, "write_sums", slowly)
    return found


@pytest.fixture
def folder(tmp_path):
    with CheckpointFolder.held(str(tmp_path / "kept"), Team.alone()) as held:
        yield held


def written_at(keeper, clock, seconds, steps=3000):
    """Times at which steps of so many seconds were followed by a checkpoint."""
    table = Tables({"sum": torch.zeros(3)})
    sweep, times, last = keeper.sweep(lambda: "sum: 1", Held({"sums": table})), [], keeper._last
    for step in range(steps):
        clock.now += seconds
        sweep.advance(step + 1)
        if keeper._last != last:
            times.append(clock.now)
            last = keeper._last
    return times


def test_every_so_many_seconds(folder, clock):
    assert written_at(FolderKeeper(folder, IDENTITY, 30.0, clock=clock), clock, 7.0, 15) == [35.0, 70.0, 105.0]


def test_after_every_step(folder, clock):
    assert len(written_at(FolderKeeper(folder, IDENTITY, 0.0, clock=clock), clock, 7.0, 5)) == 5


@pytest.mark.parametrize(("takes", "between"), [(0.0, 60.0), (1.0, 60.0), (4.0, 200.0)])
def test_a_minute_or_fifty_times_what_sums_take(folder, clock, takes, between):
    clock.while_writing = takes
    times = written_at(FolderKeeper(folder, IDENTITY, None, clock=clock), clock, 10.0, 100)
    assert times[0] == 60.0 + takes
    assert all(b - a == between + takes for a, b in itertools.pairwise(times)) and len(times) > 3


def test_the_end_of_a_sweep_and_an_interrupt_do_not_wait(folder, clock):
    keeper, table = FolderKeeper(folder, IDENTITY, 1e9, clock=clock), Tables({"sum": torch.zeros(3)})
    first = keeper.sweep(lambda: "first: 1", Held({"sums": table}))
    first.advance(1)
    assert folder.read() is None
    table.tensors["sum"] += 5
    first.end()
    table.tensors["sum"] -= 100  # who added it up goes on to use it
    second = keeper.sweep(lambda: "second: 1", Held({"sums": Tables({"sum": torch.ones(2)})}))
    second.advance(2)
    second.interrupted()
    second.interrupted()
    record = folder.read()
    assert [(sweep.position, sweep.finished) for sweep in record.sweeps] == [(1, True), (2, False)]
    again, filled = FolderKeeper(folder, IDENTITY, 1e9, record), torch.zeros(3)
    assert again.holds(lambda: "second: 1") and not again.holds(lambda: "third: 1")
    again.sweep(lambda: "first: 1", Held({"sums": Tables({"sum": filled})}))
    assert filled.tolist() == [5, 5, 5]
    with pytest.raises(ResumeError, match="goes on with 'second: 1', and this probe with 'third: 1'"):
        again.sweep(lambda: "third: 1", Held({}))


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.float64)])
def test_sums_of_another_form(folder, other):
    FolderKeeper(folder, IDENTITY, 0.0).sweep(lambda: "a: 1", Held({"sums": Tables({"sum": torch.ones(3)})})).end()
    again = FolderKeeper(folder, IDENTITY, 0.0, folder.read())
    with pytest.raises(ResumeError, match="other tensors"):
        again.sweep(lambda: "a: 1", Held({"sums": Tables({"sum": other})}))
    assert not other.any()


def test_nothing_is_kept_unless_it_is_asked_for():
    keeper = Keeper()
    sweep = keeper.sweep(lambda: pytest.fail("nobody asks"), Held({}))
    assert list(sweep.steps([3, 4])) == [3, 4] and sweep.details is None and not keeper.holds(lambda: "a: 1")


def bytes_of(folder: Path, kind: str) -> int:
    tensors = [load_file(path) for path in (folder / "rank-0-of-1").glob(f"sweep-*-{kind}-*.safetensors")]
    return sum(t.numel() * t.element_size() for found in tensors for t in found.values())


@pytest.mark.parametrize(
    "shard",
    [pytest.param(1 << 28, marks=pytest.mark.exhaustive, id="whole"), pytest.param(1 << 12, id="in pieces")],
)
def test_as_large_as_docs_say(tmp_path, monkeypatch, shard):
    """docs/scaling.md, with F = 2 functional columns and U = 1 update, in fp64."""
    monkeypatch.setattr(folder_module, "SHARD", shard)
    parameters = [p for p in wide_model().parameters() if p.requires_grad]
    elements, t = sum(p.numel() for p in parameters), len(parameters)
    batch_shape = probe(None, **CASES["units' gradients not kept, next step"])[0].sequences["entropy"].sequence_logprobs
    prompts, rows = len(SIZES), len(batch_shape)
    for name, reports in (("units' gradients kept, next step", 8), ("units' gradients not kept, next step", 10)):
        folder = tmp_path / name
        with pytest.raises(EndedError):
            probe(folder, reports, **CASES[name])
        width = load_file(next((folder / "rank-0-of-1").glob("sweep-000-sums-*")))["scores/logprobs"].shape[1]
        scores, table, touched = 16 * rows * width, 8 * rows * (2 + 3), t
        units, sums = bytes_of(folder, "units"), bytes_of(folder, "sums")
        if "not" in name:
            products = 8 * 2 * (3 * prompts + t) + 8 * 2 * (3 * t * prompts + 3)
            assert (units, sums) == (0, scores + 3 * 8 * elements + 3 * touched + table + products)
        else:
            assert (units, sums) == (3 * 8 * prompts * elements, scores + touched + table)
