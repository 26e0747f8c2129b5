"""Forecasts and what became of them over a training run: a file that only grows, and whether the forecasts are calibrated.

Legend: x a forecast, σ its standard error, y the change that really happened, τ its standard error (0 where it is not known);
i goes over the n entries looked at, those of one part whose x and y are both known. Through the origin,

    b = Σ x y / Σ x²,    SE(b)² = Σ (x_i r_i / (1 - h_i))² / (Σ x²)²,    r_i = y_i - b x_i,    h_i = x_i² / Σ x²

which is HC3, and the sum of squares of what b changes by when one entry is left out: steps need not be equally noisy. Noise in
forecasts pulls b to 0 however well they are calibrated: with x = y + noise of variance σ², b is near b₀ = 1 - Σ σ² / Σ x². So
b is not held against 1 alone, but against all from b₀ to 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest

from entropy_fast.accessors import Accessor
from entropy_fast.atomic import atomic_path
from entropy_fast.errors import LedgerError, RolloutsFileError
from entropy_fast.estimates.forecast import half_width
from entropy_fast.estimates.frames import dataframe
from entropy_fast.estimates.intervals import LEVEL
from entropy_fast.rollouts.fields import RowSource, open_regular
from entropy_fast.rollouts.parquet_metadata import check_size
from entropy_fast.scalars import as_number

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa

__all__ = ["Calibration", "EntropyLedger", "LedgerEntry"]

PARTS = ("total", "direct", "visitation")
FORECAST, REALISED = KINDS = ("forecast", "realised")
VERSION = {b"entropy_fast.ledger": b"1"}
MIN_PAIRS = 8  # fewer are not judged
ANEW = "restore the file from a copy, or begin another one."


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """One part of one step: its forecast, and what became of it. Numbers that are not known are NaN.

    Attributes:
        step: number of the update, at least 0.
        part: "total", "direct" or "visitation".
        forecast: change of the entropy, in ``unit``; std_error: its standard error, for the change by this very update.
        realised: change that was found, likewise; realised_error: its standard error.
        learning_rate: that of the update.
        unit: of the changes, such as "nats per token"; the same throughout a ledger.
        note: anything.
    """

    step: int
    part: str
    forecast: float
    std_error: float = math.nan
    realised: float = math.nan
    realised_error: float = math.nan
    learning_rate: float = math.nan
    unit: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Forecasts held against realised changes. NaN where there are too few entries for a statistic.

    Three questions are asked at about 5 % each: of windows of perfect forecasts about one in six is said to drift, and one in
    four where σ is twice as large as the changes.

    Attributes:
        part: which part of the change.
        n: entries with both numbers.
        slope: b (see the legend above); slope_error: SE(b), which needs two forecasts that are not 0.
        expected_slope: b₀ over the entries with a σ, but at least 0.
        correlation: Pearson's; needs three entries, and spread in both numbers.
        bias: mean of y - x; bias_error: its standard error, which needs two entries.
        coverage: share of the entries with a σ that have |y - x| <= 1.96 √(σ² + τ²); coverage_interval: Wilson's at 95 %.
        without_error: entries without a σ, which coverage leaves out.
        unknown: entries without a forecast or without a realised change, left out of everything; those since the first of the
            ``n`` where a window left earlier pairs out, else all.
    """

    part: str
    n: int
    slope: float
    slope_error: float
    expected_slope: float
    correlation: float
    bias: float
    bias_error: float
    coverage: float
    coverage_interval: tuple[float, float]
    without_error: int
    unknown: int

    @property
    def slope_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the slope, with Student's t on n - 1 degrees of freedom."""
        half = half_width(self.slope_error, self.n - 1, LEVEL)
        return self.slope - half, self.slope + half

    @property
    def drifts(self) -> bool | None:
        """Whether there are `complaints`; None with fewer than 8 pairs."""
        return None if self.n < MIN_PAIRS else bool(self.complaints)

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong, a clause each; none with fewer than 8 pairs, and none about coverage with fewer standard errors."""
        found = []
        (low, high), least = self.slope_interval, 1.0 if math.isnan(self.expected_slope) else self.expected_slope
        if high < least or low > 1:
            right = "1" if least > 0.995 else f"between {least:.2f}, where noise in the forecasts brings it, and 1"
            found.append(
                f"realised changes are {self.slope:.3g} times their forecasts ({low:.3g} to {high:.3g} at 95 %), not {right}"
            )
        if abs(self.bias) > 2 * self.bias_error:
            side = "above" if self.bias > 0 else "below"
            found.append(
                f"realised changes lie {abs(self.bias):.3g} ± {self.bias_error:.2g} {side} their forecasts on average"
            )
        low, high = self.coverage_interval
        if self.n - self.without_error >= MIN_PAIRS and not low <= LEVEL <= high:
            found.append(
                f"{self.coverage:.0%} of realised changes lie within 1.96 standard errors of their forecasts ({low:.0%} to "
                f"{high:.0%} at 95 %), not 95 %: the errors are too {'small' if self.coverage < LEVEL else 'large'}"
            )
        return tuple(found) if self.n >= MIN_PAIRS else ()

    @property
    def verdict(self) -> str:
        """One sentence: that nothing is wrong, what is, or that there are too few pairs to say."""
        if self.n < MIN_PAIRS:
            return f"Too few to judge: {self.n} of at least {MIN_PAIRS} forecasts with a realised change ({self.part})."
        head, judged = f"over {self.n} steps ({self.part})", self.n - self.without_error
        unjudged = "" if judged >= MIN_PAIRS else f"; coverage is not judged, with {judged} standard errors"
        if self.complaints:
            return f"Calibration drifts {head}: {'; '.join(self.complaints)}{unjudged}."
        slope = "unknown" if math.isnan(self.slope_error) else f"{self.slope:.3g} ± {self.slope_error:.2g}"
        return f"Nothing against the calibration {head}: slope {slope}{unjudged}."


class EntropyLedger:
    """Forecasts and realised changes of a training run, in memory or in one Parquet file that only grows.

    Every addition replaces the file by one that is a row longer, as a whole or not at all. Rows never change: what is realised
    later is a row of its own, which `rows` joins to its forecast. A file has one writer: another's additions are refused.

    Args:
        path: the file; what it holds is read. None to keep the entries in memory only.

    Raises:
        LedgerError: the file is damaged or no ledger, or its folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._entries: dict[tuple[int, str], LedgerEntry] = {}
        self._table: Any = None  # the file's rows, as pyarrow.Table
        self._digest = ""  # of the file; empty where there is none
        if self.path is not None and self.path.exists():
            self._table, self._digest = _read(self.path)
            for number, row in enumerate(self._table.to_pylist()):
                try:
                    entry = _joined(self._entries, row["kind"], _checked(row["kind"], row))
                except LedgerError as error:
                    where = f"{self.path}, row {number} (rows are counted from 0)"
                    raise LedgerError(f"{where}: {error.problem}", fix=ANEW) from error
                self._entries[entry.step, entry.part] = entry
        elif self.path is not None and not self.path.parent.is_dir():
            raise LedgerError(f"{self.path}: the folder {self.path.parent} does not exist.", fix="make it first.")

    def record(
        self, step: int, *, part: str = "total", forecast: float, std_error: float = math.nan, realised: float = math.nan,
        realised_error: float = math.nan, learning_rate: float = math.nan, unit: str = "", note: str = "",
    ) -> None:  # fmt: skip
        """Add the forecast of a part of a step, and what became of it where that is known; for the arguments see `LedgerEntry`.

        Raises:
            LedgerError: the part of the step is there already, a value cannot be used, the unit is not that of the entries
                before, or the file is not what this ledger last read or wrote. Nothing is added, as with the next.
            OutputFileError, FileNotFoundError: the file cannot be written; its folder is gone.
        """
        self._append(
            FORECAST,
            LedgerEntry(step, part, forecast, std_error, realised, realised_error, learning_rate, unit, note),
        )

    def realise(self, step: int, part: str, realised: float, realised_error: float = math.nan) -> None:
        """Add what became of a forecast that is there.

        Raises:
            LedgerError: there is no such forecast, what became of it is there already or is NaN here; or as for `record`.
            OutputFileError, FileNotFoundError: as for `record`.
        """
        unit = _unit(self._entries, "")
        entry = LedgerEntry(step, part, math.nan, realised=realised, realised_error=realised_error, unit=unit)
        self._append(REALISED, entry)

    plot = Accessor("ledger.plot", "Figures of the ledger; see `entropy_fast.report.plots.accessors.LedgerPlots`.")

    def rows(self) -> list[LedgerEntry]:
        """Every entry, in the order in which forecasts were recorded."""
        return list(self._entries.values())

    def to_arrow(self) -> pa.Table:
        """Every entry as a row, with the fields of `LedgerEntry`; numbers that are not known are null."""
        import pyarrow as pa

        of = {field.name: field.type for field in _schema() if field.name != "kind"}
        rows = self.rows()
        return pa.table({n: pa.array([getattr(e, n) for e in rows], kind, from_pandas=True) for n, kind in of.items()})

    def to_dataframe(self) -> pandas.DataFrame:
        """The same as a pandas DataFrame.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return dataframe(self.to_arrow(), "to_dataframe()")

    def calibration(self, part: str = "total", window: int | None = 50) -> Calibration:
        """Hold the last ``window`` forecasts with a realised change against it; all of them with None.

        Raises:
            LedgerError: there is no such part, or the window is not an integer of at least 1.
        """
        if part not in PARTS or not (window is None or (type(window) is int and window > 0)):
            raise LedgerError(
                f"calibration: part {part!r}, window {window!r}.", fix=f"one of {PARTS}; at least 1, or None."
            )
        entries = [entry for entry in self._entries.values() if entry.part == part]
        paired = [i for i, e in enumerate(entries) if not (math.isnan(e.forecast) or math.isnan(e.realised))]
        chosen = paired if window is None else paired[-window:]
        first = chosen[0] if len(chosen) < len(paired) else 0
        return _calibration(part, [entries[i] for i in chosen], unknown=len(entries) - first - len(chosen))

    def _append(self, kind: str, given: LedgerEntry) -> None:
        row = _checked(kind, vars(given))
        entry = _joined(self._entries, kind, row)
        if self.path is not None:
            self._write(self.path, {"kind": kind, **vars(row)})
        self._entries[entry.step, entry.part] = entry

    def _write(self, path: Path, row: dict[str, Any]) -> None:
        """Put the rows so far and this one in place of what this ledger read or wrote before, and of nothing else."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        one = pa.Table.from_pylist([row], schema=_schema())
        table = one if self._table is None else pa.concat_tables([self._table, one]).combine_chunks()
        pq.write_table(table, content := io.BytesIO(), write_page_checksum=True)
        with _alone(path.parent), atomic_path(path) as temporary:
            temporary.write_bytes(content.getbuffer())
            found = _digest(path.read_bytes()) if path.exists() else ""
            if found != self._digest:
                what = "was changed" if found and self._digest else "was made" if found else "was removed"
                raise LedgerError(
                    f"{path}: the file {what} by someone else since this ledger last looked; nothing was added.",
                    fix="let one ledger write a file; to go on from what is there now, make a new one of this path.",
                )
        self._table, self._digest = table, _digest(content.getbuffer())


def _checked(kind: object, values: Mapping[str, Any]) -> LedgerEntry:
    """The fields of a row, from a file or a call, each in its own type."""
    step, part, unit, note = (values[name] for name in ("step", "part", "unit", "note"))
    number = as_number(step)
    if not isinstance(number, int) or not 0 <= number < 2**63 or part not in PARTS or kind not in KINDS:
        raise LedgerError(f"{kind} of {part!r} at step {step!r}.", fix=f"steps are integers from 0; parts are {PARTS}.")
    where, numbers = f"step {number}, {part}", {}
    for name in ("forecast", "std_error", "realised", "realised_error", "learning_rate"):
        plain, signed = as_number(values[name]), name in KINDS
        if plain is None or plain < (-sys.float_info.max if signed else 0) or plain > sys.float_info.max:
            fix = f"give a finite number{'' if signed else ' of at least 0'}, or NaN where it is not known."
            raise LedgerError(f"{where}: {name} is {values[name]!r}.", fix=fix)
        numbers[name] = float(plain)
    if math.isnan(numbers["realised"]) and (kind == REALISED or not math.isnan(numbers["realised_error"])):
        raise LedgerError(f"{where}: what is realised is NaN.", fix="add it, and its error, once it is known.")
    for text in (unit, note):
        if not isinstance(text, str) or text != text.encode(errors="replace").decode():
            raise LedgerError(f"{where}: unit or note is {text!r}.", fix="give a text that UTF-8 can hold.")
    return LedgerEntry(step=number, part=part, unit=unit, note=note, **numbers)


def _joined(entries: Mapping[tuple[int, str], LedgerEntry], kind: str, new: LedgerEntry) -> LedgerEntry:
    """What a row makes together with those before it."""
    old, where = entries.get((new.step, new.part)), f"step {new.step}, {new.part}"
    unit = _unit(entries, new.unit)
    if new.unit != unit:
        fix = "give every forecast in one unit, or keep a ledger for each."
        raise LedgerError(f"{where}: the unit is {new.unit!r}, before it was {unit!r}.", fix=fix)
    if kind == FORECAST:
        if old is not None:
            raise LedgerError(
                f"{where}: a forecast is there already.", fix="record it once; keep a ledger for each run."
            )
        return new
    if old is None:
        raise LedgerError(f"{where}: what is realised has no forecast.", fix="record the forecast first.")
    if not math.isnan(old.realised):
        raise LedgerError(f"{where}: what is realised is there already.", fix="add it once.")
    return dataclasses.replace(old, realised=new.realised, realised_error=new.realised_error)


def _unit(entries: Mapping[tuple[int, str], LedgerEntry], otherwise: str) -> str:
    return next((entry.unit for entry in entries.values()), otherwise)


def _calibration(part: str, entries: Sequence[LedgerEntry], unknown: int) -> Calibration:
    x, sigma, y, tau = (
        np.array([(e.forecast, e.std_error, e.realised, e.realised_error) for e in entries]).reshape(-1, 4).T
    )
    n, xx, miss, known = len(x), float(x @ x), y - x, ~np.isnan(sigma)
    slope = slope_error = expected = correlation = bias = bias_error = coverage = math.nan
    interval = (math.nan, math.nan)
    if xx > 0:
        slope, left = float(x @ y) / xx, 1 - x**2 / xx
        if left.min() > 0:
            slope_error = math.sqrt(np.sum((x * (y - slope * x) / left) ** 2)) / xx
    if n >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
        correlation = float(np.corrcoef(x, y)[0, 1])
    if n:
        bias = float(miss.mean())
    if n >= 2:
        bias_error = float(miss.std(ddof=1)) / math.sqrt(n)
    judged = int(known.sum())
    if judged:
        within = np.abs(miss) <= 1.96 * np.hypot(sigma, np.where(np.isnan(tau), 0, tau))  # not within a σ of NaN
        found = binomtest(int(within.sum()), judged).proportion_ci(LEVEL, "wilson")
        coverage, interval = within.sum() / judged, (float(found.low), float(found.high))
        if np.any(x[known]):
            expected = max(0.0, 1 - float(np.sum(sigma[known] ** 2) / np.sum(x[known] ** 2)))
    return Calibration(
        part, n, slope, slope_error, expected, correlation, bias, bias_error, float(coverage), interval, n - judged, unknown
    )  # fmt: skip


def _schema() -> Any:
    """Of a file: the kind of a row, and the fields of `LedgerEntry`. Nothing can be null."""
    import pyarrow as pa

    types = {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    columns = {"kind": "str"} | {field.name: str(field.type) for field in dataclasses.fields(LedgerEntry)}
    return pa.schema([pa.field(name, types[kind], nullable=False) for name, kind in columns.items()], VERSION)


def _read(path: Path) -> tuple[Any, str]:
    """A file's rows, as ``pyarrow.Table``, and its digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as file:
            content = file.read()
        stored = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        schema = stored.schema_arrow
        if not schema.equals(_schema(), check_metadata=True):
            raise LedgerError(f"{path} is no ledger of this version: its columns are {schema.names}.", fix=ANEW)
        check_size(stored.metadata, RowSource(path, "row", 0))
        table = stored.read()
        table.validate(full=True)
    except LedgerError:
        raise
    except RolloutsFileError as error:
        raise LedgerError(error.problem, fix=ANEW) from error
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise LedgerError(f"{path}: it cannot be read as a ledger ({error}).", fix=ANEW) from error
    return table, _digest(content)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, where it can have one: nobody writes between the look at a file and its replacement."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
