"""JSON Lines: reading any file of objects, and the rows of a rollouts file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from entropy_fast.rollouts.fields import RowSource, open_regular
from entropy_fast.rollouts.rows import RolloutsTable

__all__ = ["JsonLineError", "iterate_jsonl", "json_lines", "write_jsonl"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLineError(ValueError):
    """A line that is no JSON object; for whoever reads a file to put the file's name in front.

    Attributes:
        line: its number, from 1.
        problem: what it holds.
        fix: what to do about it.
    """

    def __init__(self, line: int, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.line, self.problem, self.fix = line, problem, fix


class _UnacceptableError(ValueError):
    """Something the JSON parser would let through and this format does not."""


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a file; blank lines are counted and skipped.

    Raises:
        JsonLineError: a line is not UTF-8, not JSON, or not an object of unique keys and finite numbers.
        OSError: the file cannot be opened or read, or is not a regular one.
    """
    with open_regular(path) as file:
        # Bytes, so that only "\n" ends a line (text may hold U+2028) and bad UTF-8 is found on its own line.
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield number, _parse(line, number)


def iterate_jsonl(source: RowSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """`json_lines` of a rollouts file.

    Raises:
        RolloutsFileError: a line is not UTF-8, not JSON, or not an object of unique keys.
        OSError: the file cannot be opened or read.
    """
    try:
        yield from json_lines(source.path)
    except JsonLineError as error:
        source.fail(error.line, error.problem, fix=error.fix, cause=error)


def write_jsonl(table: RolloutsTable, path: Path) -> None:
    """Write one object per line. Numbers are written so that they read back bit for bit; text is escaped to ASCII."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        for row in range(len(table.offsets) - 1):
            tokens = slice(table.offsets[row], table.offsets[row + 1])
            values: dict[str, Any] = {key: column[row] for key, column in table.scalars.items()}
            values["input_ids"] = table.input_ids[tokens].tolist()
            values["loss_mask"] = table.loss_mask[tokens].tolist()
            own = slice(table.response_offsets[row], table.response_offsets[row + 1])
            values.update({key: numbers[own].tolist() for key, numbers in table.by_token.items()})
            file.write(json.dumps(values, allow_nan=False) + "\n")


def _parse(line: bytes, number: int) -> dict[str, Any]:
    fix = "write one complete JSON object per line, in UTF-8."
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise JsonLineError(number, f"it is not UTF-8 (byte {error.start + 1} of the line).", fix) from error
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else " The file ends within this line: it may be cut off."
        raise JsonLineError(number, f"it is not JSON ({error.msg}, column {error.colno}).{cut}", fix) from error
    except _UnacceptableError as error:
        raise JsonLineError(number, str(error), "write every key once, and finite numbers only.") from error
    except MemoryError as error:
        raise JsonLineError(number, f"there is not enough memory for it ({len(line)} bytes).", fix) from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, brackets nested too deep
        raise JsonLineError(number, f"it cannot be parsed ({error}).", fix) from error
    if not isinstance(value, dict):
        raise JsonLineError(number, f"it holds {type(value).__name__}, not an object.", fix)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _UnacceptableError(f"the key `{key}` is there twice.")
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise _UnacceptableError(f"it holds {name}, which is not a JSON number.")
