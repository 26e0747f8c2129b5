"""Probes that end before their time: the same call goes on from what they left, to the same number, bit by bit."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import pytest
import torch
from ended_probes import CASES, SIZES, EndedError, all_of, in_another_process, kill, probe

from entropy_fast import DeltaH1Result
from entropy_fast.distributed import Team
from entropy_fast.engines.one_pass.runner import Runner
from entropy_fast.errors import OutputFileError
from entropy_fast.resuming import folder as folder_module
from entropy_fast.resuming.folder import CheckpointFolder

FAST = list(CASES)[:2]


@functools.cache
def expected(name: str) -> tuple[tuple[str, str], list[tuple[str, int, int]]]:
    """All numbers of a probe that nothing ends and that keeps nothing, with its plan, and what it reports."""
    result, seen = probe(None, **CASES[name])
    return found_by(result), seen


def found_by(result: DeltaH1Result) -> tuple[str, str]:
    return all_of(result), str(result.diagnostics.plan)


def ended(folder: Path, name: str, at: int) -> None:
    with pytest.raises(EndedError):
        probe(folder, at, **CASES[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_changes_no_number_and_goes_with_the_probe(tmp_path, name):
    result, _ = probe(tmp_path / "kept", **CASES[name])
    assert found_by(result) == expected(name)[0]
    assert not (tmp_path / "kept").exists()
    assert not any("went on" in note for note in result.diagnostics.warnings)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_ended_at_every_microbatch(tmp_path, name):
    numbers, whole = expected(name)
    reports, sweeps = len(whole), sum(done == total for _, done, total in whole)
    for at in range(1, reports + 1, 1 + reports // 20):
        folder = tmp_path / str(at)
        ended(folder, name, at)
        result, seen = probe(folder, **CASES[name])
        assert found_by(result) == numbers, at
        assert len(seen) <= reports - at + sweeps  # one for each sweep that is there, and what was left to do
        assert not folder.exists()


@pytest.mark.parametrize("name", FAST)
def test_killed(tmp_path, name):
    """By SIGKILL, in the middle; and those that go on are killed too, further on, in each sweep."""
    numbers, whole = expected(name)
    reports = len(whole)
    for at in (reports // 2, *[4] * (reports // len(SIZES) - 1)):
        assert in_another_process(lambda at=at: probe(tmp_path / "kept", at, kill, **CASES[name])) == -signal.SIGKILL
    result, seen = probe(tmp_path / "kept", **CASES[name])
    assert found_by(result) == numbers
    assert len(seen) < reports - 1
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", [FAST[0], pytest.param(FAST[1], marks=pytest.mark.exhaustive)])
def test_killed_within_a_write(tmp_path, monkeypatch, name):
    """Before a file is renamed, and after: the checkpoint is the one before, or the new one, and both lead there."""
    numbers, _ = expected(name)
    replace, count = os.replace, 0

    def dying(*arguments: str, at: int, after: bool) -> None:
        nonlocal count
        count += 1
        if count == at and not after:
            kill()
        replace(*arguments)
        if count == at:
            kill()

    # Files of a checkpoint are renamed two or three at a time, the one that names the others last.
    for at, after in ((5, False), (6, True), (2, False), (3, True)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", functools.partial(dying, at=at, after=after))
            assert in_another_process(lambda: probe(tmp_path / "kept", **CASES[name])) == -signal.SIGKILL
        with CheckpointFolder.held(str(tmp_path / "kept"), Team.alone()) as held:
            assert held.read() is not None
    result, _ = probe(tmp_path / "kept", **CASES[name])
    assert found_by(result) == numbers
    assert not (tmp_path / "kept").exists()


def test_progress_counts_what_was_there_and_the_result_says_so(tmp_path):
    name = FAST[1]
    _, whole = expected(name)
    at = next(place for place, (stage, done, total) in enumerate(whole) if stage == "projections" and done < total)
    ended(tmp_path, name, at + 1)
    result, seen = probe(tmp_path, **CASES[name])
    stages = list(dict.fromkeys(stage for stage, _, _ in whole))
    total = whole[0][2]
    assert seen[: len(stages)] == [*((stage, total, total) for stage in stages[:-1]), whole[at]]
    (note,) = [note for note in result.diagnostics.warnings if "went on" in note]
    assert "1 unit(s) of 'projections' (sweep 3) had been gone through" in note and str(tmp_path) in note


def test_an_interrupt_is_written_down_at_once(tmp_path):
    """Ctrl-C between two checkpoints: nothing of what was done before it is done again."""
    name, options = FAST[1], {**CASES[FAST[1]], "checkpoint_seconds": 1e6}
    at = len(expected(name)[1]) - 2

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(tmp_path / "kept", at, interrupt, **options)
    result, seen = probe(tmp_path / "kept", **options)
    assert found_by(result) == expected(name)[0]
    assert seen[2][1] == 2 and len(seen) == 3 + 2  # three sweeps that were there, and the two prompts that were not


def test_units_are_written_once_and_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    name, written = FAST[0], []
    full = len(SIZES) + 1 + 2 * 2 + 1  # of the scores, two units with what goes with them, and within the third
    real = folder_module.save_file

    def writing(tensors, path):
        if len(written) == full:
            raise OSError(28, "No space left on device")
        written.append({key: len(tensor) for key, tensor in tensors.items() if "/" in key})
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_file", writing)
        with pytest.raises(OutputFileError, match="No space left"):
            probe(tmp_path / "kept", **CASES[name])
    with CheckpointFolder.held(str(tmp_path / "kept"), Team.alone()) as held:
        record = held.read()
        files = {path.name for path in held.path.iterdir()}
    assert [sweep.position for sweep in record.sweeps] == [4, 2]
    assert [file.units for file in record.sweeps[1].files] == [(0, 1), (1, 2), None]
    assert files == {"checkpoint.json", *(file.name for sweep in record.sweeps for file in sweep.files)}
    result, _ = probe(tmp_path / "kept", **CASES[name])
    assert found_by(result) == expected(name)[0]


@pytest.mark.exhaustive
def test_memory_that_ran_out_has_run_out(tmp_path, monkeypatch):
    """What went through in one forward, until it did not: scores come first then, and microbatches stay as small."""
    options = {"entropy_estimator": "rao_blackwell", "baseline": "prompts", "prompts_per_microbatch": None}
    whole = Runner.run

    def limited(self, microbatch, recorder, table):
        refused = whole(self, microbatch, recorder, table)
        if len(microbatch.rollouts.prompt_index[microbatch.rows].unique()) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return refused

    monkeypatch.setattr(Runner, "run", limited)
    expected, seen = probe(None, **options)
    assert "memory ran out" in str(expected.diagnostics.plan) and seen[0][0] == "scores"
    for place in range(1, len(seen) + 1):
        with pytest.raises(EndedError):
            probe(tmp_path / "kept", place, **options)
        found, _ = probe(tmp_path / "kept", **options)
        assert all_of(found) == all_of(expected), place
        assert "memory ran out" in str(found.diagnostics.plan)


@pytest.mark.exhaustive
def test_a_parameter_that_was_left_out_in_a_second_sweep_is_left_out(tmp_path, monkeypatch):
    """In the first sweep it was not; the second started again without it."""
    options, whole, calls = CASES[FAST[1]], Runner.run, 0

    def late(self, microbatch, recorder, table):
        nonlocal calls
        refused = whole(self, microbatch, recorder, table)
        calls += table is None
        return {self._context.registry.names[0]} if calls == 3 and table is None and not self.left_out else refused

    monkeypatch.setattr(Runner, "run", late)
    expected, seen = probe(None, **options)
    assert [own[1] for own in seen[-6:]] == [1, 2, 1, 2, 3, 4]
    for at in range(5, len(seen) + 1):
        calls = 0
        with pytest.raises(EndedError):
            probe(tmp_path / "kept", at, **options)
        # Where it had been left out already, the one that goes on never tries it.
        calls = 0 if at < len(seen) - 3 else 3
        found, _ = probe(tmp_path / "kept", **options)
        if at >= len(seen) - 3:
            assert all_of(found) == all_of(expected), at
            assert found.diagnostics.plan.captured == expected.diagnostics.plan.captured
