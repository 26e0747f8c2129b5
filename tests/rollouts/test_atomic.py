"""atomic_path: the target is the old file or the whole new one, and nothing is left beside it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entropy_fast.atomic import atomic_path
from entropy_fast.errors import OutputFileError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_target_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "result.tar.json"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == {"result.tar.json"}


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, problem: type[BaseException]) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise problem

    with pytest.raises(problem):
        write()
    assert target.read_text() == "old"
    assert names(tmp_path) == {"result.json"}


def test_a_block_may_fail_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "result.json"):
        _ = 1 / 0
    assert names(tmp_path) == set()


def test_writing_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(FileNotFoundError, match=r"result\.json: nothing was written"), atomic_path(target):
        pass
    assert target.read_text() == "old"


def test_a_directory_or_a_missing_directory_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    ran = []
    with pytest.raises(IsADirectoryError, match="expected the path of a file"), atomic_path(tmp_path):
        ran.append("directory")
    with pytest.raises(FileNotFoundError, match="missing does not exist"), atomic_path(tmp_path / "missing" / "a.json"):
        ran.append("missing")
    assert ran == []


def test_nested_writers_of_one_target_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    with atomic_path(target) as outer:
        outer.write_text("outer")
        with atomic_path(target) as inner:
            inner.write_text("inner")
        assert target.read_text() == "inner"
    assert target.read_text() == "outer"


def test_permissions_follow_the_umask_or_the_existing_file(tmp_path: Path) -> None:
    plain, target = tmp_path / "plain.json", tmp_path / "result.json"
    plain.write_text("")
    with atomic_path(target) as temporary:
        temporary.write_text("1")
    assert target.stat().st_mode == plain.stat().st_mode
    target.chmod(0o640)
    with atomic_path(target) as temporary:
        temporary.write_text("2")
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    stored, link = tmp_path / "store" / "real.json", tmp_path / "link.json"
    stored.write_text("old")
    link.symlink_to(stored)
    with atomic_path(os.fspath(link)) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert stored.read_text() == "new"
    assert names(tmp_path / "store") == {"real.json"}


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputFileError, match=r"result\.json: the file cannot be written \(No space left") as caught:
        write()
    assert isinstance(caught.value, OSError)
    assert target.read_text() == "old"
    assert names(tmp_path) == {"result.json"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_without_space_is_named(tmp_path: Path) -> None:
    """The kernel's own error, for a write that is flushed when the file is closed."""

    def write() -> None:
        with atomic_path(tmp_path / "full") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")

    with pytest.raises(OutputFileError, match=r"full: the file cannot be written \(No space left"):
        write()
    assert names(tmp_path) == set()


def test_errors_of_this_package_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OutputFileError, match="inner"), atomic_path(tmp_path / "outer"):
        raise OutputFileError("inner", fix="-")


KILLED = """
import os, sys
from entropy_fast.atomic import atomic_path
writers = [atomic_path(target) for target in sys.argv[1:]]
for writer in writers:
    writer.__enter__().write_text("half")
os.kill(os.getpid(), 9)
"""


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    target, other = tmp_path / "result.json", tmp_path / "other.json"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target), str(other)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert len(names(tmp_path)) == 2, "what belongs to the other target is not touched"
    with atomic_path(other) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == {"result.json", "other.json"}


def test_what_a_running_writer_has_open_is_left_alone(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.json") as outer:
        running = outer.with_name(outer.name.replace(str(os.getpid()), str(os.getppid())))
        running.write_text("of another process")
        with atomic_path(tmp_path / "a.json") as inner:
            inner.write_text("inner")
        assert running.exists()
        outer.write_text("outer")
