"""What a Parquet file asks for, by its metadata: looked at before anything of that size is read."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

from entropy_fast.rollouts.fields import LARGEST_ARRAY_BYTES, RowSource

__all__ = ["check_size"]

# Of a child that looks at metadata, which takes it milliseconds.
SECONDS = 10


def check_size(metadata: Any, source: RowSource) -> None:
    """Raise where a column asks for more than an array may hold: runs of one value and compression take next to no space.

    Args:
        metadata: ``pyarrow.parquet.FileMetaData``.
        source: the file, for the message.

    Raises:
        RolloutsFileError: one does, or the metadata are damaged.
    """
    # pyarrow ends the whole process where the metadata of a column are not there.
    if not _survived(lambda: _column_sizes(metadata)):
        source.fail_file("its metadata are damaged.", fix="write the file anew.")
    for name, size in _column_sizes(metadata):
        if size > LARGEST_ARRAY_BYTES:
            source.fail_file(
                f"the column `{name}` asks for {size / 2**30:.1f} GiB; at most {LARGEST_ARRAY_BYTES / 2**30:.0f} GiB are read.",
                fix="split the file; if it is small, its entries are damaged or repeat one value.",
            )


def _column_sizes(metadata: Any) -> list[tuple[str, int]]:
    """Name and bytes of every column, of all row groups together."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    sizes = []
    for index in range(metadata.num_columns) if groups else ():
        chunks = [group.column(index) for group in groups]
        values, stored = sum(c.num_values for c in chunks), sum(c.total_uncompressed_size for c in chunks)
        sizes.append((chunks[0].path_in_schema.partition(".")[0], max(8 * values, stored)))
    return sizes


def _survived(look: Callable[[], object]) -> bool:
    """Whether a copy of this process comes through it; True where processes have no copies."""
    if not hasattr(os, "fork"):
        return True
    with warnings.catch_warnings():
        # Of a fork beside other threads, whose locks the copy may find held: the alarm ends it then.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return os.waitpid(process, 0)[1] == 0
    status = 1
    try:
        import resource

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        look()
        status = 0
    finally:
        os._exit(status)
