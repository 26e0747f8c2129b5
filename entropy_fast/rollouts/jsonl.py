"""Rows of a JSON Lines rollouts file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from entropy_fast.rollouts.fields import RowSource
from entropy_fast.rollouts.rows import RolloutsTable

__all__ = ["iterate_jsonl", "write_jsonl"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _UnacceptableError(ValueError):
    """Something the JSON parser would let through and this format does not."""


def iterate_jsonl(source: RowSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line; blank lines are counted and skipped.

    Raises:
        RolloutsFileError: a line is not UTF-8, not JSON, or not an object of unique keys.
        OSError: the file cannot be opened or read.
    """
    with source.path.open("rb") as file:
        # Bytes, so that only "\n" ends a line (text may hold U+2028) and bad UTF-8 is found on its own line.
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield number, _parse(line, number, source)


def write_jsonl(table: RolloutsTable, path: Path) -> None:
    """Write one object per line. Numbers are written so that they read back bit for bit; text is escaped to ASCII."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        for row in range(len(table.offsets) - 1):
            tokens = slice(table.offsets[row], table.offsets[row + 1])
            values: dict[str, Any] = {key: column[row] for key, column in table.scalars.items()}
            values["input_ids"] = table.input_ids[tokens].tolist()
            values["loss_mask"] = table.loss_mask[tokens].tolist()
            if table.old_logprobs is not None:
                own = slice(table.response_offsets[row], table.response_offsets[row + 1])
                values["old_logprobs"] = table.old_logprobs[own].tolist()
            file.write(json.dumps(values, allow_nan=False) + "\n")


def _parse(line: bytes, number: int, source: RowSource) -> dict[str, Any]:
    fix = "write one complete JSON object per line, in UTF-8."
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        source.fail(number, f"it is not UTF-8 (byte {error.start + 1} of the line).", fix=fix, cause=error)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else " The file ends within this line: it may be cut off."
        source.fail(number, f"it is not JSON ({error.msg}, column {error.colno}).{cut}", fix=fix, cause=error)
    except _UnacceptableError as error:
        source.fail(number, str(error), fix="write every key once, and finite numbers only.", cause=error)
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, brackets nested too deep
        source.fail(number, f"it cannot be parsed ({error}).", fix=fix, cause=error)
    if not isinstance(value, dict):
        source.fail(number, f"it holds {type(value).__name__}, not an object.", fix=fix)
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
