"""``validation.json``: forecasts held against what their steps really did, on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_fast.atomic import atomic_path
from entropy_fast.errors import ResultError
from entropy_fast.run_folder.json_reading import from_json
from entropy_fast.truth import Validation

__all__ = ["VALIDATION", "VALIDATION_SCHEMA", "read_validation", "write_validation"]

VALIDATION = "validation.json"
VALIDATION_SCHEMA = "entropy_fast.validation/1"
INFINITE = "infinite"  # of what is never reached; JSON has no such number


def write_validation(found: Mapping[str, Validation], folder: Path) -> Path:
    """Write validations by the names of their runs; what is not known is null.

    Args:
        found: at least one.
        folder: is made where it is missing.

    Returns:
        The file's path.

    Raises:
        OutputFileError: it cannot be written.
    """
    runs = {name: _plain(dataclasses.asdict(one)) for name, one in found.items()}
    text = json.dumps({"schema": VALIDATION_SCHEMA, "runs": runs}, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / VALIDATION) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / VALIDATION


def read_validation(path: Path) -> dict[str, Validation]:
    """What `write_validation` wrote.

    Raises:
        ResultError: the file cannot be read, or is none of these.
    """
    again = "validate the run again."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path} cannot be read: {error}", fix=again) from error
    schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if schema != VALIDATION_SCHEMA:
        raise ResultError(f"{path} has schema {schema!r}, expected {VALIDATION_SCHEMA!r}.", fix=again)
    runs = document.get("runs")
    if not isinstance(runs, dict):
        raise ResultError(f"{path}: `runs` is no object.", fix=again)
    return {name: from_json(Validation, _numbers(one), f"{path}: {name}") for name, one in runs.items()}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else INFINITE
    return value


def _numbers(run: Any) -> Any:
    if not isinstance(run, dict):
        return run
    return {key: math.inf if value == INFINITE else value for key, value in run.items()}
