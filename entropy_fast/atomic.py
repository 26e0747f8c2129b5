"""Writing a file so that readers see the old one or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entropy_fast.errors import EntropyFastError, OutputFileError

__all__ = ["atomic_path"]


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes ``target`` when the block ends without an exception.

    The temporary file lies in the target's directory (a rename is atomic only within one file system) under a hidden,
    unique name with the target's suffix, which writers that choose a format by suffix need. The block must create it.
    On any exception, ``KeyboardInterrupt`` included, it is removed and an existing target is left as it was. A writer that
    is killed cannot remove its own: the next one of the same target on the same machine does. An existing target hands its
    permission bits on; if it is a symbolic link, the file it points to is replaced.
    Nothing is flushed to the disk explicitly: this protects from a failing writer, not from a power cut.

    Args:
        target: the file to create or replace; a file, not a directory.

    Raises:
        FileNotFoundError: the target's directory does not exist, or the block wrote nothing.
        IsADirectoryError: the target is a directory.
        OutputFileError: the block raised an ``OSError`` (no space, no permission), or the file cannot be put in its place.
    """
    final = Path(os.path.realpath(target))
    if final.is_dir():
        raise IsADirectoryError(f"{target} is a directory; expected the path of a file.")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{target}: the directory {final.parent} does not exist; create it first.")
    prefix = _prefix(final)
    _remove_left_overs(final.parent, prefix)
    # Not tempfile.mkstemp: it would give the final file mode 0600 whatever the umask says.
    temporary = final.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(8)}{final.suffix}")
    try:
        try:
            yield temporary
        except EntropyFastError:
            raise  # of a file that the block reads, or of a target within this one: it says which
        except OSError as error:
            raise _cannot_write(target, error) from error
        if not temporary.is_file():
            raise FileNotFoundError(f"{target}: nothing was written to {temporary}.")
        try:
            if final.exists():
                shutil.copymode(final, temporary)
            os.replace(temporary, final)
        except OSError as error:
            raise _cannot_write(target, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _cannot_write(target: str | os.PathLike[str], error: OSError) -> OutputFileError:
    return OutputFileError(
        f"{os.fspath(target)}: the file cannot be written ({error.strerror or error}).",
        fix="free space there, or write to another place; what was there before is unchanged.",
    )


def _prefix(final: Path) -> str:
    """How the temporary names of one target on one machine begin; what follows is the writer's process id."""
    names = (final.name, socket.gethostname())
    digests = [hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest() for name in names]
    return f".tmp-{'-'.join(digests)}-"


def _remove_left_overs(folder: Path, prefix: str) -> None:
    """Remove temporary files of this target whose writer is no longer running; others' are left alone."""
    if os.name != "posix":  # elsewhere asking for a process by signal 0 ends it
        return
    for path in folder.iterdir():
        process = path.name[len(prefix) :].partition("-")[0]
        if path.name.startswith(prefix) and process.isdigit() and not _is_running(int(process)):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
