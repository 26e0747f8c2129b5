"""The ledger's file through crashes, damage and other writers; its statistics against computations written another way.

Legend: x forecasts, σ their standard errors, y realised changes, τ their standard errors, b the slope of y on x through 0.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
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
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from entropy_fast.errors import LedgerError, OutputFileError
from entropy_fast.truth import Calibration, EntropyLedger, LedgerEntry

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


def ledger_of(entries: Sequence[Sequence[float]], part: str = "total") -> EntropyLedger:
    ledger = EntropyLedger()
    for step, (x, sigma, y, tau) in enumerate(entries):
        ledger.record(step, part=part, forecast=x, std_error=sigma, realised=y, realised_error=tau)
    return ledger


def wilson(k: int, n: int) -> list[float]:
    """Shares at which k of n are 1.96 of that share's own standard deviations off, found by bisection."""
    z = stats.norm.ppf(0.975)

    def off(p: float) -> float:
        return (k - n * p) ** 2 - z**2 * n * p * (1 - p)

    # Where none or all are, the share itself is the other root.
    low = 0.0 if k == 0 else optimize.brentq(off, 1e-15, k / n - 1e-9, xtol=1e-15)
    high = 1.0 if k == n else optimize.brentq(off, k / n + 1e-9, 1 - 1e-15, xtol=1e-15)
    return [float(low), float(high)]


def refitted(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope by least squares, and the root of the sum of squares of its changes when one entry is left out."""

    def fit(kept: list[int]) -> float:
        solution = np.linalg.lstsq(np.array([[x[i]] for i in kept]), np.array([y[i] for i in kept]), rcond=None)
        return float(solution[0][0])

    everything = list(range(len(x)))
    slope = fit(everything)
    return slope, math.sqrt(sum((fit(everything[:i] + everything[i + 1 :]) - slope) ** 2 for i in everything))


numbers = st.floats(-5, 5).map(lambda value: round(value, 3))
maybe = st.one_of(numbers.map(abs), st.just(NAN))
entry = st.tuples(st.one_of(numbers, st.just(NAN)), maybe, numbers, maybe)
unrealised = st.tuples(numbers, maybe, st.just(NAN), st.just(NAN))


@given(entries=st.lists(st.one_of(entry, entry, entry, unrealised), max_size=25), window=st.integers(1, 30) | st.none())
def test_statistics_against_computations_written_another_way(
    entries: list[tuple[float, float, float, float]], window: int | None
) -> None:
    found = ledger_of(entries, "direct").calibration("direct", window)
    seen: list[tuple[float, float, float, float]] = []  # from the last entry back, until the window is full
    n_pairs = sum(not math.isnan(x + y) for x, _, y, _ in entries)
    for x, sigma, y, tau in reversed(entries):
        if window is not None and n_pairs > window and sum(not math.isnan(e[0] + e[2]) for e in seen) == window:
            break
        seen.append((x, sigma, y, 0.0 if math.isnan(tau) else tau))
    pairs = [e for e in reversed(seen) if not math.isnan(e[0] + e[2])]
    unknown = len(seen) - len(pairs)
    xs, ys = [p[0] for p in pairs], [p[2] for p in pairs]
    assert (found.part, found.n, found.unknown) == ("direct", len(pairs), unknown)

    def expect(value: float, expected: float) -> None:
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)

    n_moving = sum(x != 0 for x in xs)
    expect(found.slope, np.linalg.lstsq(np.array(xs)[:, None], np.array(ys), rcond=None)[0][0] if n_moving else NAN)
    if n_moving < 2:
        assert math.isnan(found.slope_error)
    elif 1 - max(x * x for x in xs) / sum(x * x for x in xs) > 1e-4:  # else rounding decides
        slope, error = refitted(xs, ys)
        expect(found.slope_error, error)
        expect(found.slope_interval[1], slope + error * stats.t(len(xs) - 1).ppf(0.975))
        expect(found.slope_interval[0], slope - error * stats.t(len(xs) - 1).ppf(0.975))
    spread = len(xs) >= 3 and len(set(xs)) > 1 and len(set(ys)) > 1
    expect(found.correlation, stats.pearsonr(xs, ys).statistic if spread else NAN)
    misses = [y - x for x, y in zip(xs, ys, strict=True)]
    expect(found.bias, math.fsum(misses) / len(misses) if misses else NAN)
    expect(found.bias_error, float(stats.sem(misses)) if len(misses) > 1 else NAN)
    judged = [p for p in pairs if not math.isnan(p[1])]
    k = sum(abs(y - x) <= 1.96 * math.hypot(sigma, tau) for x, sigma, y, tau in judged)
    assert found.without_error == len(pairs) - len(judged)
    expect(found.coverage, k / len(judged) if judged else NAN)
    for value, expected in zip(found.coverage_interval, wilson(k, len(judged)) if judged else (NAN, NAN), strict=True):
        expect(value, expected)
    squares = sum(x * x for x, *_ in judged)
    expect(found.expected_slope, max(0.0, 1 - sum(p[1] ** 2 for p in judged) / squares) if squares else NAN)
    assert found.drifts is None if len(pairs) < 8 else found.drifts in (True, False)


def stream(
    n: int, seed: int, *, slope: float = 1.0, bias: float = 0.0, claimed: float = 1.0, noise: float = 0.3
) -> list[list[float]]:
    """Forecasts that are the change and noise; ``claimed`` is the size of their errors over that of their noise."""
    generator = np.random.default_rng(seed)
    sigma, tau = noise * generator.uniform(0.5, 1.5, n), 0.1 * generator.uniform(0.5, 1.5, n)
    change = generator.normal(-0.3, 1, n)
    x = change + sigma * generator.normal(size=n)
    y = slope * change + bias + tau * generator.normal(size=n)
    return np.stack([x, claimed * sigma, y, claimed * tau], 1).tolist()  # type: ignore[no-any-return]


def judged(entries: Sequence[Sequence[float]]) -> Calibration:
    return ledger_of(entries).calibration(window=None)


def test_a_calibrated_stream_is_not_said_to_drift() -> None:
    for noise in (0.05, 0.3, 1.0):
        found = judged(stream(2000, 1, noise=noise))
        assert found.drifts is False, found.verdict
        assert found.verdict.startswith("Nothing against the calibration over 2000 steps (total): slope ")
    # Noise pulls the slope: held against 1 alone, it would be said to drift.
    assert found.slope_interval[1] < 0.6
    assert found.expected_slope == pytest.approx(1 / (1 + 1 / 1.09), abs=0.1)
    assert found.coverage == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("n", [20, 50])
def test_how_often_a_calibrated_window_is_said_to_drift(n: int) -> None:
    drifting = [judged(stream(n, seed)).drifts for seed in range(300)]
    assert 0.03 < np.mean([bool(d) for d in drifting]) < 0.22


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"slope": 0.5}, "realised changes are 0.4.* times their forecasts"),
        ({"slope": 2.0}, "realised changes are 1.[6-9].* times their forecasts"),
        ({"bias": 0.2}, "realised changes lie 0.* above their forecasts on average"),
        ({"bias": -0.2}, "realised changes lie 0.* below their forecasts on average"),
        ({"claimed": 0.5}, "the errors are too small"),
        ({"claimed": 2.0}, "the errors are too large"),
    ],
)
def test_a_stream_that_is_off_drifts_and_the_verdict_says_how(wrong: dict[str, float], said: str) -> None:
    for seed in range(5):
        found = judged(stream(500, seed, **wrong))
        assert found.drifts is True
        assert found.verdict.startswith("Calibration drifts over 500 steps (total): ")
        assert re.search(said, found.verdict), found.verdict


def test_what_is_wrong_only_in_the_window_shows_in_the_window() -> None:
    ledger = ledger_of(stream(400, 0) + stream(100, 1, slope=0.0))
    assert ledger.calibration(window=100).drifts is True
    assert ledger.calibration(window=100).n == 100
    assert ledger.calibration().n == 50
    assert "times their forecasts" in ledger.calibration(window=100).verdict
    assert "times their forecasts" not in judged(stream(400, 0)).verdict


def test_seven_pairs_are_too_few_and_eight_are_not() -> None:
    entries = [[1.0 + i, NAN, 3.0 + i * i, NAN] for i in range(8)]
    few, enough = judged(entries[:7]), judged(entries)
    assert (few.drifts, few.complaints) == (None, ())
    assert few.verdict == "Too few to judge: 7 of at least 8 forecasts with a realised change (total)."
    assert enough.drifts is True
    assert "above their forecasts" in enough.verdict
    assert enough.verdict.endswith("; coverage is not judged, with 0 standard errors.")


# Forecasts, and misses that cancel in slope and bias.
BALANCED = [(1.0, 1e-3), (1.0, -1e-3), (-1.0, 1e-3), (-1.0, -1e-3)]


def test_coverage_is_judged_by_its_own_number_of_entries() -> None:
    # Slope and bias are as they should be, and the errors of the first eight far too small.
    entries = [[x, 1e-6 if i < 8 else NAN, x + miss, NAN] for i, (x, miss) in enumerate(BALANCED * 3)]
    assert "too small" in judged(entries).verdict
    entries[0][1] = NAN
    found = judged(entries)
    assert found.without_error == 5
    assert found.drifts is False
    assert found.verdict.endswith("coverage is not judged, with 7 standard errors.")


def test_forecasts_of_nothing_have_no_slope() -> None:
    found = judged([[0.0, 1.0, 0.1 * (-1) ** i, NAN] for i in range(20)])
    assert math.isnan(found.slope)
    assert found.drifts is False
    assert "slope unknown" in found.verdict
