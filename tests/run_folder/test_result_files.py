"""A folder holds one result or none: files of two runs never pass for one, wherever a writer stops."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from small_policy import saved_run

from entropy_fast import EstimateOptions, RunOptions, fast_delta_h1, read_rollouts
from entropy_fast.errors import OutputFileError, ResultError, RunFolderError
from entropy_fast.run_folder import placing
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.interrupts import signals_wait
from entropy_fast.run_folder.model_source import ModelSource, load_model
from entropy_fast.run_folder.result_files import (
    read_result_document,
    read_result_table,
    result_document,
    write_result,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two results of one model: with shares of sequences, and without, of another learning rate."""
    folder = saved_run(tmp_path_factory.mktemp("run"))
    model = attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")
    rollouts = read_rollouts(folder / "rollouts.jsonl")

    def probe(rate, **run):
        estimate = EstimateOptions(learning_rate=rate)
        return fast_delta_h1(model, folder / "optimizer.pt", rollouts, estimate=estimate, run=RunOptions(**run))

    return probe(1e-3, engine="one_pass", by_sequence=True), probe(1e-4)


def draw(result, path: Path) -> None:
    path.write_bytes(f"a picture of {result.delta_h1}".encode())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whose(folder: Path, results) -> int | None:
    """Which of the two results the folder holds whole; None where it holds none."""
    try:
        document = read_result_document(folder)
    except ResultError:
        return None
    rows = read_result_table(folder, "per_prompt.parquet").to_pylist()
    [number] = [i for i, result in enumerate(results) if result.delta_h1 == document["delta_h1"]]
    assert [row["delta_h1"] for row in rows] == [p.delta_h1 for p in results[number].per_prompt]
    expected = {"per_prompt.parquet"} | ({"per_sequence.parquet", "contributions.png"} if number == 0 else set())
    assert (
        set(document["files"])
        == expected
        == {path.name for path in folder.iterdir()}
        & {
            "per_prompt.parquet",
            "per_sequence.parquet",
            "contributions.png",
        }
    )
    return number


def test_a_result_replaces_another_whole(results, tmp_path):
    first, second = results
    folder = tmp_path / "a" / "b"
    names = ["result.json", "per_prompt.parquet", "per_sequence.parquet", "contributions.png"]
    assert write_result(first, folder, draw=draw) == [folder / name for name in names]
    assert whose(folder, results) == 0
    (folder / "mine.txt").write_text("kept")
    (folder / "result.json").chmod(0o640)
    assert write_result(second, folder) == [folder / name for name in names[:2]]
    assert whose(folder, results) == 1
    assert {path.name for path in folder.iterdir()} == {"result.json", "per_prompt.parquet", "mine.txt"}
    assert (folder / "result.json").stat().st_mode & 0o777 == 0o640
    with pytest.raises(ResultError, match=r"no table per_sequence\.parquet"):
        read_result_table(folder, "per_sequence.parquet")


def test_what_is_read_is_what_was_written(results, tmp_path):
    write_result(results[0], tmp_path, draw=draw)
    document = read_result_document(tmp_path)
    assert {key: value for key, value in document.items() if key != "files"} == result_document(results[0])
    rows = read_result_table(tmp_path, "per_sequence.parquet").to_pylist()
    assert [row["delta_h1"] for row in rows] == results[0].by_sequence["both"].delta_h1.tolist()


@pytest.mark.parametrize("name", ["per_prompt.parquet", "per_sequence.parquet", "contributions.png"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], None])
def test_a_file_that_changed_is_found(results, tmp_path, name, damage):
    write_result(results[0], tmp_path, draw=lambda result, path: path.write_bytes(bytes(100)))
    path = tmp_path / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ResultError, match=name):
        read_result_document(tmp_path)


def test_a_file_of_another_result_beside_it_is_found(results, tmp_path):
    write_result(results[1], tmp_path)
    (tmp_path / "contributions.png").write_bytes(b"another's")
    with pytest.raises(ResultError, match=r"contributions\.png"):
        read_result_document(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"schema": "entropy_fast.result/1"}', "[" * 100_000, "\xff"]
)
def test_a_document_that_is_none_is_a_sentence(tmp_path, text):
    with pytest.raises(ResultError, match=r"result\.json"):
        read_result_document(tmp_path)
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultError, match=r"result\.json"):
        read_result_document(tmp_path)


@pytest.mark.parametrize("files", [[], "x", {"../run.json": "0"}, {"result.json": "0"}])
def test_names_that_are_not_of_a_result_are_not_read(results, tmp_path, files):
    write_result(results[1], tmp_path)
    document = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**document, "files": files}))
    with pytest.raises(ResultError):
        read_result_document(tmp_path)


def test_pages_of_tables_have_checksums(results, tmp_path):
    write_result(results[0], tmp_path)
    path = tmp_path / "per_sequence.parquet"
    whole = path.read_bytes()
    value = results[0].by_sequence["both"].delta_h1.numpy().tobytes()[:8]
    place = whole.index(value)
    path.write_bytes(whole[:place] + bytes([value[0] ^ 1]) + whole[place + 1 :])
    pq.read_table(path)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


class Stopped(BaseException):
    """A process that ends here."""


STEPS = (
    "os.replace",
    "shutil.copymode",
    "Path.mkdir",
    "Path.unlink",
    "pq.write_table",
    "shutil.rmtree",
    "Path.write_text",
)


class Steps:
    """Counts the calls that change the folder, and stops at one of them: once, or from there on, as a kill does."""

    def __init__(self, monkeypatch, stop_at: int, *, killed: bool) -> None:
        self.count, self.stop_at, self.killed = 0, stop_at, killed
        from entropy_fast.run_folder import result_files

        owners = {"os": os, "shutil": placing.shutil, "Path": Path, "pq": result_files.pq}
        for step in STEPS:
            owner, name = step.split(".")
            monkeypatch.setattr(owners[owner], name, self.counted(getattr(owners[owner], name)))

    def counted(self, real):
        def call(*arguments, **named):
            self.count += 1
            if self.count == self.stop_at or (self.killed and self.count > self.stop_at):
                raise Stopped
            return real(*arguments, **named)

        return call


def write_and_stop(results, folder, number, stop_at, *, killed):
    """Write result ``number``; how many steps it took, and whether it was stopped."""
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, stop_at, killed=killed)
        try:
            write_result(results[number], folder, draw=draw if number == 0 else None)
        except Stopped:
            return steps.count, True
        return steps.count, False


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("killed", [False, True])
def test_stopped_at_every_step_there_is_the_old_result_the_new_one_or_none(results, tmp_path, number, killed):
    old = 1 - number
    write_result(results[old], tmp_path / "count", draw=draw if old == 0 else None)
    total, _ = write_and_stop(results, tmp_path / "count", number, 0, killed=False)
    assert total > 10
    seen = set()
    for stop_at in range(1, total + 1):
        folder = tmp_path / f"{stop_at}"
        write_result(results[old], folder, draw=draw if old == 0 else None)
        before = contents(folder)
        _, stopped = write_and_stop(results, folder, number, stop_at, killed=killed)
        found = whose(folder, results)
        seen.add(found)
        if not killed and stopped and found == old:
            # An exception leaves nothing behind; a kill may, until the next writer comes.
            assert contents(folder) == before
        if not killed:
            assert found is not None
        write_result(results[number], folder, draw=draw if number == 0 else None)
        assert whose(folder, results) == number
        assert not list(folder.glob(".tmp-*"))
    assert seen == ({None, old, number} if killed else {old, number})


def test_a_failing_writer_leaves_no_folder(results, tmp_path):
    total, _ = write_and_stop(results, tmp_path / "count", 0, 0, killed=False)
    for stop_at in range(1, total):
        _, stopped = write_and_stop(results, tmp_path / "new" / f"{stop_at}", 0, stop_at, killed=False)
        if stopped and whose(tmp_path / "new" / f"{stop_at}", results) is None:
            assert not (tmp_path / "new").exists()
        elif (tmp_path / "new").exists():
            placing.shutil.rmtree(tmp_path / "new")


KILLED = """
import os, signal, sys
from pathlib import Path
from entropy_fast.run_folder.placing import put_in_place
real, left = os.replace, [int(sys.argv[2])]
def replace(*arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(*arguments)
os.replace = replace
def fill(folder):
    for name in ("first", "second"):
        (folder / name).write_text("new")
put_in_place(Path(sys.argv[1]), ("first", "second"), fill)
"""


def test_a_writer_that_is_killed_for_good(tmp_path):
    (tmp_path / "first").write_text("old")
    (tmp_path / "second").write_text("old")
    found = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "3"], check=False)
    assert found.returncode == -signal.SIGKILL
    assert not (tmp_path / "first").exists()  # so the second does not count
    assert (tmp_path / "second").read_text() == "new"
    [left] = tmp_path.glob(".tmp-*")
    assert (left / "before" / "first").read_text() == "old"
    names = placing.put_in_place(tmp_path, ("first", "second"), lambda folder: (folder / "first").write_text("next"))
    assert names == ["first"]
    assert contents(tmp_path) == {"first": b"next"}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_hundred_kills_at_any_moment(results, tmp_path):
    """A process that writes one result over the other is killed after a time that no clock decides the outcome of."""
    write_result(results[0], tmp_path, draw=draw)
    chance, found = random.Random(0), set()
    for _ in range(200):
        process = os.fork()
        if not process:
            try:
                while True:
                    for result in results:
                        write_result(result, tmp_path, draw=draw if result is results[0] else None)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        # `whose` compares every file with those of the result that the document is of.
        found.add(whose(tmp_path, results))
    assert found <= {0, 1, None}
    assert {0, 1} <= found
    write_result(results[1], tmp_path)
    assert whose(tmp_path, results) == 1
    assert not list(tmp_path.glob(".tmp-*"))


def test_writers_wait_for_one_another(results, tmp_path):
    write_result(results[0], tmp_path, draw=draw)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    (tmp_path / ".tmp-result-alive").mkdir()
    writer = threading.Thread(target=write_result, args=(results[1], tmp_path))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()
    assert (tmp_path / ".tmp-result-alive").exists()
    os.close(handle)
    writer.join()
    assert whose(tmp_path, results) == 1


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("delta_h1", float("nan"), "`delta_h1` is nan"),
        ("std_error", float("inf"), "`std_error` is inf"),
        ("row_sums", torch.tensor([1.0, torch.nan]), "`row_sums` is nan"),
        ("functionals", {"reward": float("inf")}, "reward` is inf"),
    ],
)
def test_numbers_that_are_not_finite_are_not_written(results, tmp_path, field, value, named):
    write_result(results[1], tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ResultError, match=named):
        write_result(dataclasses.replace(results[0], **{field: value}), tmp_path)
    broken = dataclasses.replace(results[0].per_prompt[0], delta_h1=float("nan"))
    with pytest.raises(ResultError, match="delta_h1` is nan"):
        write_result(dataclasses.replace(results[0], per_prompt=(broken,)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_is_a_sentence(results, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match="is not a folder"):
            write_result(results[1], folder)
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    with pytest.raises(RunFolderError, match="not writable"):
        write_result(results[1], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_a_sentence_and_the_old_result_stays(results, tmp_path, monkeypatch):
    write_result(results[0], tmp_path, draw=draw)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("entropy_fast.run_folder.result_files.pq.write_table", full)
    with pytest.raises(OutputFileError, match="No space left on device"):
        write_result(results[1], tmp_path)
    assert whose(tmp_path, results) == 0
    assert not list(tmp_path.glob(".tmp-*"))


def test_signals_act_after_the_work_and_handlers_come_back():
    acted = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: acted.append(number))
    try:
        with signals_wait():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert acted == []
        assert acted == [signal.SIGTERM] * 2
        with pytest.raises(KeyboardInterrupt), signals_wait():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_comparing_two_results_does_not_raise(results):
    first, second = results
    assert first == first
    assert first != second
    assert len({first, second}) == 2
