"""What loading weights reported: a weight that is in no file would be a random number, so it is an error that names it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from entropy_fast.errors import RunFolderError

__all__ = ["first_line", "ordinary_files", "require_every_weight"]

NAMES_SHOWN = 3


def require_every_weight(
    what: str, *, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str] = (), fix: str
) -> None:
    """Raise unless the file and the model have the same weights.

    Args:
        what: the model or adapter, for the message.
        missing: names that the model has and the file lacks; weights tied to others do not belong here.
        unexpected: names that the file has and the model lacks.
        mismatched: names with another shape in the file.
        fix: what to do about it.

    Raises:
        RunFolderError: they differ; the message names the first of each kind.
    """
    found = [
        f"{description} {_named(sorted(names))}"
        for description, names in (
            ("lacks", set(missing)),
            ("has, unknown to the model,", set(unexpected)),
            ("has in another shape", set(mismatched)),
        )
        if names
    ]
    if found:
        raise RunFolderError(
            f"{what}: the weights file {'; it '.join(found)}. What is not in the file would be random numbers.", fix=fix
        )


def ordinary_files(folder: Path, what: str) -> None:
    """Raise when the folder holds a pipe, socket or device, on which reading would wait for ever.

    Raises:
        RunFolderError: it does.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise RunFolderError(
                f"{what} {folder}: {path.name} is not a file.", fix="remove it, or pass another folder."
            )


def first_line(error: BaseException) -> str:
    """What an error of a library says in its first line, with its type where that alone would be unclear."""
    text = str(error).strip()
    line = text.splitlines()[0][:300] if text else ""
    if isinstance(error, (OSError, ValueError, ImportError)) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _named(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(f"'{name}'" for name in names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
