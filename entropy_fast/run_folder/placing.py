"""Putting several files into a folder as one: all of them, or what was there before."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from entropy_fast.errors import EntropyFastError, OutputFileError, RunFolderError
from entropy_fast.run_folder.interrupts import signals_wait

__all__ = ["check_folder", "new_folder", "put_in_place"]

PREFIX = ".tmp-result-"
PREFIX_OF_FOLDERS = ".tmp-folder-"
# File systems without locks: there, two writers at once can take one another's temporary folder away, and one of them fails.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
FIX = "pass --out with another folder."


def check_folder(folder: Path) -> None:
    """Find out before the work whether the folder could be written to; nothing is made.

    Raises:
        RunFolderError: it or the nearest folder above it that exists is a file, or cannot be written to.
    """
    above = folder
    try:
        while not above.exists():
            if above == above.parent:
                break
            above = above.parent
        usable = above.is_dir()
    except OSError as error:
        raise RunFolderError(f"results cannot be written to {folder}: {error.strerror or error}.", fix=FIX) from error
    if not usable:
        raise RunFolderError(f"results cannot be written to {folder}: {above} is not a folder.", fix=FIX)
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunFolderError(f"results cannot be written to {folder}: {above} is not writable.", fix=FIX)


def put_in_place(folder: Path, names: Sequence[str], fill: Callable[[Path], None]) -> list[str]:
    """Let ``fill`` write files into a temporary folder, then move them into ``folder`` in place of all of ``names``.

    The first name is taken away first and put in place last: as long as it is not there, the others do not count. On an
    exception everything is as it was. A process that is killed in between leaves the folder without the first name, and the
    next writer removes what it left. One writer at a time: a second waits.

    Args:
        folder: made where it is missing, and removed again when this fails.
        names: every file the folder may hold of this kind; ``fill`` writes the first and any of the others.
        fill: is given the temporary folder.

    Returns:
        The names that were written, in the order of ``names``.

    Raises:
        RunFolderError: the folder cannot be.
        OutputFileError: it cannot be made, or a file cannot be written.
    """
    check_folder(folder)
    try:
        with _made(folder), _alone(folder):
            _remove_left_overs(folder, PREFIX)
            temporary = folder / f"{PREFIX}{secrets.token_hex(8)}"
            try:
                temporary.mkdir()
                fill(temporary)
                written = [name for name in names if (temporary / name).is_file()]
                assert written[:1] == list(names[:1]), written
                with signals_wait():
                    _exchange(folder, temporary, names, written)
            finally:
                with signals_wait():
                    shutil.rmtree(temporary, ignore_errors=True)
    except EntropyFastError:
        raise  # some are OSErrors too, and say more than could be said here
    except OSError as error:
        raise OutputFileError(
            f"results cannot be written to {folder}: {error.strerror or error}.",
            fix="free space there, or pass --out with another folder; what was there before is unchanged.",
        ) from error
    return written


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` to write into, which becomes it when the block ends without an exception.

    On an exception it is removed, and folders above that had to be made with it. A writer that is killed leaves it under its
    hidden name, and the next writer beside it removes it. One writer at a time in the folder above: a second waits.

    Args:
        folder: must not exist, or be empty.

    Raises:
        RunFolderError: it exists, or cannot be.
        OutputFileError: it cannot be made, or a file in it cannot be written.
    """
    folder = folder.absolute()
    check_folder(folder)
    try:
        with _made(folder.parent), _alone(folder.parent):
            _remove_left_overs(folder.parent, PREFIX_OF_FOLDERS)
            temporary = folder.parent / f"{PREFIX_OF_FOLDERS}{secrets.token_hex(8)}"
            try:
                if folder.is_symlink() or (folder.exists() and any(folder.iterdir())):
                    raise RunFolderError(f"{folder} is there already.", fix="pass a folder that does not exist yet.")
                temporary.mkdir()
                yield temporary
                with signals_wait():
                    os.replace(temporary, folder)
            finally:
                with signals_wait():
                    shutil.rmtree(temporary, ignore_errors=True)
    except EntropyFastError:
        raise  # as below
    except OSError as error:
        raise OutputFileError(
            f"{folder} cannot be written: {error.strerror or error}.", fix="free space there, or pass another folder."
        ) from error


def _exchange(folder: Path, new: Path, names: Sequence[str], written: Sequence[str]) -> None:
    """Old files out, new ones in, the first of ``names`` being there only while all others are its own."""
    old = new / "before"
    old.mkdir()
    try:
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, old / name)
                if name in written:
                    shutil.copymode(old / name, new / name)
        for name in reversed(written):
            os.replace(new / name, folder / name)
    except BaseException:
        for name in written:
            if not (new / name).exists():  # moved already
                (folder / name).unlink(missing_ok=True)
        for name in reversed(names):
            if (old / name).exists():
                os.replace(old / name, folder / name)
        raise


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder and those above it; what had to be made is removed when the block fails."""
    made: list[Path] = []
    above = folder
    while not above.exists():
        made.append(above)
        above = above.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if it is empty: another process may have come to use it
        raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that what another writer left is known to be left."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def _remove_left_overs(folder: Path, prefix: str) -> None:
    """Temporary folders of writers that were killed; whoever holds the lock is the only one alive."""
    for path in folder.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)
