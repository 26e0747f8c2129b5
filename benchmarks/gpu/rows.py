"""Rows of the report, in a file that grows while a stage runs: whatever ends the stage, what it found is there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

OK, WRONG, SKIPPED, OUT_OF_TIME = "ok", "wrong", "skipped", "out of time"
# Of rows in the file alone: what becomes of them is known when the stage has ended.
RUNNING, PLANNED = "running", "planned"
Status = Literal["ok", "wrong", "skipped", "out of time", "running", "planned"]
Value = str | int | float | None


@dataclasses.dataclass
class Row:
    """One line of the report.

    Attributes:
        stage: name of the stage.
        name: what was looked at.
        status: how it went.
        why: the reason, unless all is well.
        values: what was found, by name of the number, unit included.
        seconds: how long it took; None where nobody looked.
    """

    stage: str
    name: str
    status: Status = OK
    why: str = ""
    values: dict[str, Value] = dataclasses.field(default_factory=dict)
    seconds: float | None = None

    def set(self, status: Status, why: str) -> None:
        self.status, self.why = status, why


class RowWriter:
    """Appends a stage's rows to a file. A row that is written again takes the place of the one before."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage = path, stage

    def plan(self, names: Sequence[str]) -> None:
        """Names that the report shall have even if the stage does not get to them."""
        for name in names:
            self.write(name, PLANNED)

    def write(self, name: str, status: Status, why: str = "", values: Mapping[str, Value] | None = None) -> None:
        self._append(Row(self._stage, name, status, why, dict(values or {})))

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[Row]:
        """A row that is filled in the body. An exception there is the row's, and the next row has its turn."""
        row, start = Row(self._stage, name), time.monotonic()
        self._append(dataclasses.replace(row, status=RUNNING))
        try:
            yield row
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            said = " ".join(f"{type(error).__name__}: {error}".split())
            # By name, so that stages without torch need not import it.
            row.set(SKIPPED if type(error).__name__ == "OutOfMemoryError" else WRONG, said[:600])
            row.values = {}
        row.seconds = round(time.monotonic() - start, 2)
        self._append(row)

    def _append(self, row: Row) -> None:
        # One write of a whole line, so that a process killed here leaves no half of one.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """The last of every row, in the order of the first."""
    if not path.exists():
        return []
    found: dict[tuple[str, str], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = Row(**json.loads(line))
        found[row.stage, row.name] = row
    return list(found.values())
