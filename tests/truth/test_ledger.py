"""The ledger's file through crashes, damage and other writers."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from damage import damaged_bytes, refused

from entropy_fast.errors import LedgerError, OutputFileError
from entropy_fast.truth import EntropyLedger, LedgerEntry

NAN = math.nan


def same(found: Sequence[LedgerEntry], expected: Sequence[LedgerEntry]) -> bool:
    """Equal, with NaN equal to NaN."""
    return repr(found) == repr(expected)


def filled(path: Path | None) -> EntropyLedger:
    ledger = EntropyLedger(path)
    ledger.record(3, forecast=-0.25, std_error=0.5, learning_rate=1e-6, unit="nats", note="ü\n\x1b[2J")
    ledger.record(3, part="direct", forecast=NAN, unit="nats")
    ledger.record(5, forecast=1e-300, realised=0.0, realised_error=0.0, unit="nats")
    ledger.realise(3, "total", -0.125, 0.0625)
    ledger.record(4, part="visitation", forecast=0.1 + 0.2, unit="nats")
    ledger.realise(4, "visitation", 2.0)
    return ledger


FILLED = [
    LedgerEntry(3, "total", -0.25, 0.5, -0.125, 0.0625, 1e-6, "nats", "ü\n\x1b[2J"),
    LedgerEntry(3, "direct", NAN, unit="nats"),
    LedgerEntry(5, "total", 1e-300, NAN, 0.0, 0.0, unit="nats"),
    LedgerEntry(4, "visitation", 0.1 + 0.2, NAN, 2.0, unit="nats"),
]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    written = filled(path)
    assert same(written.rows(), FILLED)
    assert same(filled(None).rows(), FILLED)
    read = EntropyLedger(path)
    assert same(read.rows(), FILLED)
    # It goes on from there, and so does the next one.
    read.realise(3, "direct", 7.0)
    read.record(6, forecast=1.0, unit="nats")
    assert same(EntropyLedger(path).rows(), read.rows())
    assert read.rows()[1].realised == 7.0
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.parquet"]


def test_rows_of_the_file_never_change(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    ledger = EntropyLedger(path)
    before: list[str] = []

    def look() -> None:
        now = [repr(row) for row in pq.read_table(path).to_pylist()]
        assert now[: len(before)] == before
        assert len(now) == len(before) + 1
        before[:] = now

    for step in range(4):
        ledger.record(step, forecast=-0.1 * step)
        look()
        ledger.realise(step, "total", 0.2 * step)
        look()


def test_what_is_not_known_is_nan_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    EntropyLedger(path).record(0, forecast=NAN)
    (row,) = pq.read_table(path).to_pylist()
    (entry,) = EntropyLedger(path).rows()
    for name in ("forecast", "std_error", "realised", "realised_error", "learning_rate"):
        assert math.isnan(row[name])
        assert math.isnan(getattr(entry, name))
    found = EntropyLedger(path).calibration()
    assert (found.n, found.unknown, found.drifts) == (0, 1, None)
    statistics = [value for value in dataclasses.astuple(found) if isinstance(value, float)]
    assert len(statistics) == 7
    assert all(math.isnan(value) for value in [*statistics, *found.coverage_interval, *found.slope_interval])


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    ledger = EntropyLedger(path)
    step: Any = np.int64(2)
    ledger.record(step, forecast=torch.tensor(0.5), std_error=np.float32(0.25), learning_rate=1)  # type: ignore[arg-type]
    ledger.realise(step, "total", torch.tensor(2.0, dtype=torch.bfloat16))  # type: ignore[arg-type]
    assert same(EntropyLedger(path).rows(), [LedgerEntry(2, "total", 0.5, 0.25, 2.0, learning_rate=1.0)])


class KilledError(BaseException):
    """Stands for whatever ends a writer."""


@pytest.mark.parametrize("where", ["pyarrow.parquet.write_table", "pathlib.Path.write_bytes", "os.replace"])
@pytest.mark.parametrize("error", [KilledError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    path = tmp_path / "ledger.parquet"
    ledger = filled(path)
    before = path.read_bytes()

    def failing(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, failing)
        with pytest.raises((error, OutputFileError)):
            ledger.record(9, forecast=1.0, unit="nats")
        with pytest.raises((error, OutputFileError)):
            ledger.realise(3, "direct", 1.0)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.parquet"]
    assert same(ledger.rows(), FILLED)
    # What was not added can be, by the same ledger.
    ledger.record(9, forecast=1.0, unit="nats")
    assert same(EntropyLedger(path).rows(), [*FILLED, LedgerEntry(9, "total", 1.0, unit="nats")])


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    early, late = EntropyLedger(path), EntropyLedger(path)
    early.record(0, forecast=1.0)
    with pytest.raises(LedgerError, match=r"ledger\.parquet: the file was made by someone else.*nothing was added"):
        late.record(1, forecast=2.0)
    other = EntropyLedger(path)
    other.record(1, forecast=2.0)
    with pytest.raises(LedgerError, match="the file was changed by someone else"):
        early.realise(0, "total", 1.0)
    assert same(early.rows(), [LedgerEntry(0, "total", 1.0)])
    assert late.rows() == []
    assert same(EntropyLedger(path).rows(), other.rows())
    path.unlink()
    with pytest.raises(LedgerError, match="the file was removed by someone else"):
        other.record(2, forecast=2.0)
    assert not path.exists()


def test_nobody_writes_between_the_look_and_the_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.parquet"
    first, second = EntropyLedger(path), EntropyLedger(path)
    refusals: list[BaseException] = []
    replace = os.replace

    def tries() -> None:
        try:
            second.record(0, forecast=2.0)
        except LedgerError as error:
            refusals.append(error)

    thread = threading.Thread(target=tries)

    def slow(source: str, target: str) -> None:
        if not thread.ident:
            thread.start()
            thread.join(0.3)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    first.record(0, forecast=1.0)
    thread.join(10)
    assert len(refusals) == 1
    assert same(EntropyLedger(path).rows(), [LedgerEntry(0, "total", 1.0)])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    filled(path)
    content, chance = path.read_bytes(), random.Random(0)
    cases = [b"", b"PAR1", content[:-1], content[: len(content) // 2], b"\0" * 100]
    for case in cases:
        path.write_bytes(case)
        assert refused(lambda: EntropyLedger(path), case)
    n_refused = 0
    for _ in range(150):
        path.write_bytes(case := damaged_bytes(content, chance))
        n_refused += refused(lambda: EntropyLedger(path), case)
        assert path.read_bytes() == case
    assert n_refused > 100


@pytest.mark.exhaustive
def test_no_damage_reads_as_other_entries(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    filled(path)
    content = bytearray(path.read_bytes())
    refusals = 0
    for at in range(4, pq.read_metadata(path).row_group(0).total_byte_size, 5):  # pages; after them come the metadata
        content[at] ^= 0x10
        path.write_bytes(content)
        content[at] ^= 0x10
        if refused(lambda: EntropyLedger(path), at):
            refusals += 1
        else:
            assert same(EntropyLedger(path).rows(), FILLED), at
    assert refusals > 50


def test_a_file_that_asks_for_more_than_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.parquet"
    filled(path)
    monkeypatch.setattr("entropy_fast.rollouts.parquet_metadata.LARGEST_ARRAY_BYTES", 40)
    with pytest.raises(LedgerError, match=r"asks for .* GiB"):
        EntropyLedger(path)


def table(**changes: object) -> pa.Table:
    """A file of one row, which a ledger could have written, with something changed."""
    ledger_row: dict[str, Any] = {"kind": "forecast", **dataclasses.asdict(LedgerEntry(1, "total", 0.5))}
    types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    fields = [pa.field(key, types[type(value)], nullable=False) for key, value in ledger_row.items()]
    row = {**ledger_row, **changes}
    return pa.Table.from_pylist([row], schema=pa.schema(fields, {"entropy_fast.ledger": "1"}))


@pytest.mark.parametrize(
    ("foreign", "said"),
    [
        (table().drop_columns(["note"]), "no ledger"),
        (table().append_column("more", pa.array([1])), "no ledger"),
        (table().replace_schema_metadata({"entropy_fast.ledger": "2"}), "no ledger"),
        (table().replace_schema_metadata(None), "no ledger"),
        (table().set_column(1, "step", pa.array([1.0])), "no ledger"),
        (pa.table({"a": [1]}), "no ledger"),
        (table(kind="else"), "row 0 .*else of 'total'"),
        (table(kind="realised", realised=1.0), "row 0 .*has no forecast"),
        (table(part="tail"), "row 0 .*'tail'"),
        (table(step=-1), "row 0 .*step -1"),
        (table(forecast=math.inf), "row 0 .*forecast is inf"),
        (table(std_error=-1.0), "row 0 .*std_error is -1"),
        (pa.concat_tables([table(), table()]), "row 1 .*a forecast is there already"),
        (pa.concat_tables([table(), table(step=2, unit="bits")]), "row 1 .*the unit is 'bits', before it was ''"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, foreign: pa.Table, said: str) -> None:
    path = tmp_path / "ledger.parquet"
    pq.write_table(table(), path)
    assert same(EntropyLedger(path).rows(), [LedgerEntry(1, "total", 0.5)])
    pq.write_table(foreign, path)
    with pytest.raises(LedgerError, match=said):
        EntropyLedger(path)


def test_a_folder_or_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        EntropyLedger(tmp_path)
    with pytest.raises(LedgerError, match="does not exist"):
        EntropyLedger(tmp_path / "none" / "ledger.parquet")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda it: it.record(3, forecast=1.0, unit="nats"), "step 3, total: a forecast is there already"),
        (lambda it: it.realise(3, "total", 1.0), "step 3, total: what is realised is there already"),
        (lambda it: it.realise(5, "total", 1.0), "step 5, total: what is realised is there already"),
        (lambda it: it.realise(3, "visitation", 1.0), "step 3, visitation: what is realised has no forecast"),
        (lambda it: it.realise(3, "direct", NAN), "what is realised is NaN"),
        (lambda it: it.record(9, forecast=1.0, realised_error=1.0, unit="nats"), "what is realised is NaN"),
        (lambda it: it.record(9, forecast=1.0), "the unit is '', before it was 'nats'"),
        (lambda it: it.record(9, forecast=math.inf, unit="nats"), "forecast is inf"),
        (lambda it: it.record(9, forecast=-math.inf, unit="nats"), "forecast is -inf"),
        (lambda it: it.record(9, forecast=10**400, unit="nats"), "forecast is 1000"),
        (lambda it: it.record(9, forecast=True, unit="nats"), "forecast is True"),
        (lambda it: it.record(9, forecast=None, unit="nats"), "forecast is None"),
        (lambda it: it.record(9, forecast=1.0, std_error=-0.1, unit="nats"), "std_error is -0.1"),
        (lambda it: it.record(9, forecast=1.0, learning_rate=-0.1, unit="nats"), "learning_rate is -0.1"),
        (lambda it: it.record(9, forecast=1.0, realised=1.0, realised_error=math.inf, unit="nats"), "realised_error"),
        (lambda it: it.realise(3, "direct", math.inf), "realised is inf"),
        (lambda it: it.record(-1, forecast=1.0, unit="nats"), "step -1"),
        (lambda it: it.record(1.0, forecast=1.0, unit="nats"), "step 1.0"),
        (lambda it: it.record(True, forecast=1.0, unit="nats"), "step True"),
        (lambda it: it.record(9, part="tail", forecast=1.0, unit="nats"), "'tail'"),
        (lambda it: it.record(9, forecast=1.0, unit="nats", note="\ud800"), "unit or note"),
        (lambda it: it.record(9, forecast=1.0, unit=3), "unit or note is 3"),
        (lambda it: it.calibration("tail"), "part 'tail'"),
        (lambda it: it.calibration(window=0), "window 0"),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_what_does_not_fit_is_refused_and_adds_nothing(
    tmp_path: Path, in_file: bool, call: Callable[[EntropyLedger], object], said: str
) -> None:
    path = tmp_path / "ledger.parquet" if in_file else None
    ledger = filled(path)
    before = path.read_bytes() if path else b""
    with pytest.raises(LedgerError, match=said):
        call(ledger)
    assert same(ledger.rows(), FILLED)
    assert (path.read_bytes() if path else b"") == before


def test_as_a_table_and_as_a_data_frame(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "l.parquet")
    table = ledger.to_arrow()
    assert table.column_names == [field.name for field in dataclasses.fields(LedgerEntry)]
    for row, entry in zip(table.to_pylist(), ledger.rows(), strict=True):
        known = {name: NAN if value is None else value for name, value in row.items()}
        assert same([LedgerEntry(**known)], [entry])
    assert table["forecast"].null_count == 1 and table["realised"].null_count == 1
    frame = ledger.to_dataframe()
    assert frame["realised"].isna().tolist() == [math.isnan(entry.realised) for entry in ledger.rows()]
    assert frame["note"].tolist() == [entry.note for entry in ledger.rows()]
    assert len(EntropyLedger().to_arrow()) == 0
