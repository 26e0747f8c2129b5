"""Formats of rollouts files, by suffix: the registry, and JSON Lines and Parquet in it.

To add one, write a file beside `entropy_fast.rollouts.jsonl` with a function that goes through rows and one that writes a
table, and register a `RolloutsFormat` of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entropy_fast.errors import RolloutsFileError
from entropy_fast.rollouts.fields import RowSource
from entropy_fast.rollouts.jsonl import iterate_jsonl, write_jsonl
from entropy_fast.rollouts.parquet import iterate_parquet, write_parquet

__all__ = ["RolloutsFormat", "format_of", "register_format"]


@dataclasses.dataclass(frozen=True)
class RolloutsFormat:
    """One format.

    Attributes:
        suffix: of its files, with the dot.
        place: what a row is called in messages, and ``first`` the number of the first.
        iterate: the rows of a file, each with its number.
        write: a table of rows into a file that appears only when it is complete.
    """

    suffix: str
    place: str
    first: int
    iterate: Callable[[RowSource], Iterator[Any]]
    write: Callable[[Any, Path], None]


_FORMATS: dict[str, RolloutsFormat] = {}


def register_format(kind: RolloutsFormat) -> RolloutsFormat:
    """Make a format known, or put it in the place of the one with its suffix. Returns it."""
    _FORMATS[kind.suffix] = kind
    return kind


def format_of(path: Path) -> RolloutsFormat:
    """The format of a file, by its suffix.

    Raises:
        RolloutsFileError: there is none.
    """
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise RolloutsFileError(
            f"{path}: the suffix {path.suffix!r} names no rollouts format.",
            fix=f"use {' or '.join(_FORMATS)}; compressed JSON Lines must be unpacked first.",
        )
    return found


register_format(RolloutsFormat(".jsonl", "line", 1, iterate_jsonl, write_jsonl))
register_format(RolloutsFormat(".parquet", "row", 0, iterate_parquet, write_parquet))
