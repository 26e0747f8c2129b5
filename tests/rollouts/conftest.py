"""Small builders shared by the tests of rollouts files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Write = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture(params=["jsonl", "parquet"])
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def write_rows(tmp_path: Path, suffix: str) -> Write:
    """Write rows by hand, not through the package, in the format of the ``suffix`` fixture."""

    def write(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"rows.{suffix}"
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    return write


@pytest.fixture
def at(suffix: str) -> Callable[[int], str]:
    """How a message names the row at an index: lines of JSON Lines count from 1, rows of Parquet from 0."""

    def name(index: int) -> str:
        if suffix == "jsonl":
            return f"line {index + 1} (lines are counted from 1)"
        return f"row {index} (rows are counted from 0)"

    return name
