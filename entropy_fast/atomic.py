"""Writing a file so that readers see the old one or the whole new one, never a part."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path"]


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes ``target`` when the block ends without an exception.

    The temporary file lies in the target's directory (a rename is atomic only within one file system) under a hidden,
    unique name with the target's suffix, which writers that choose a format by suffix need. The block must create it.
    On any exception, ``KeyboardInterrupt`` included, it is removed and an existing target is left as it was. An
    existing target hands its permission bits on; if it is a symbolic link, the file it points to is replaced.
    Nothing is flushed to the disk explicitly: this protects from a failing writer, not from a power cut.

    Args:
        target: the file to create or replace; a file, not a directory.

    Raises:
        FileNotFoundError: the target's directory does not exist, or the block wrote nothing.
        IsADirectoryError: the target is a directory.
    """
    final = Path(os.path.realpath(target))
    if final.is_dir():
        raise IsADirectoryError(f"{target} is a directory; expected the path of a file.")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{target}: the directory {final.parent} does not exist; create it first.")
    # Not tempfile.mkstemp: it would give the final file mode 0600 whatever the umask says.
    temporary = final.with_name(f".tmp-{secrets.token_hex(8)}{final.suffix}")
    try:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(f"{target}: nothing was written to {temporary}.")
        if final.exists():
            shutil.copymode(final, temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
