"""Forecasts against what became of them over the steps of a run, and training steps that were kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from entropy_fast.report.html.numbers import plain, signed, with_error
from entropy_fast.report.html.series import ScatterFigure, StepsFigure, scatter_figure, steps_figure
from entropy_fast.report.text import printable
from entropy_fast.run_folder.run_reading import KeptStep
from entropy_fast.truth import Calibration, EntropyLedger, LedgerEntry

__all__ = ["CalibrationPart", "CalibrationSection", "LedgerRow", "StepRow", "calibration_section", "step_rows"]

ABOUT = {
    "direct": ("Direct part", "at the prefixes that are visited"),
    "total": ("Total", "direct and visitation together"),
    "visitation": ("Visitation part", "how often prefixes are visited"),
}
PATH = 200
MOST_ROWS = 400  # of the table


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One step in the table."""

    step: int
    forecast: str
    realised: str
    difference: str


@dataclasses.dataclass(frozen=True)
class CalibrationPart:
    """One part of the change over all steps of a ledger.

    Attributes:
        title: its name; about: what it is.
        verdict: whether forecasts are calibrated, a sentence.
        facts: names and texts of slope, coverage, bias, correlation.
        steps: the figure over steps; scatter: of realised against forecast. None where there is too little.
        rows: a row a step.
    """

    title: str
    about: str
    verdict: str
    facts: tuple[tuple[str, str], ...]
    steps: StepsFigure | None
    scatter: ScatterFigure | None
    rows: tuple[LedgerRow, ...]


@dataclasses.dataclass(frozen=True)
class CalibrationSection:
    """A ledger.

    Attributes:
        name: of its file.
        unit: of the changes.
        parts: that have entries.
        left_out: steps that the tables do not show.
    """

    name: str
    unit: str
    parts: tuple[CalibrationPart, ...]
    left_out: int


@dataclasses.dataclass(frozen=True)
class StepRow:
    """A kept training step."""

    step: int
    folder: str
    direct: str
    total: str
    probed: bool


def calibration_section(ledger: EntropyLedger) -> CalibrationSection:
    """Of any ledger."""
    entries = ledger.rows()
    parts = []
    longest = 0
    for name in ABOUT:
        own = [entry for entry in entries if entry.part == name]
        if own:
            parts.append(_part(name, own, ledger.calibration(name, window=None)))
            longest = max(longest, len(own))
    path = "in memory" if ledger.path is None else ledger.path.name
    unit = next((entry.unit for entry in entries if entry.unit), "")
    return CalibrationSection(printable(path, PATH), printable(unit, PATH), tuple(parts), max(0, longest - MOST_ROWS))


def step_rows(steps: Sequence[KeptStep], folder: Path) -> tuple[StepRow, ...]:
    """Kept steps with the forecasts of that time; folders as seen from the run's."""
    return tuple(_step(kept, folder) for kept in steps)


def _step(kept: KeptStep, folder: Path) -> StepRow:
    online = kept.online
    split = {} if online is None else online.split
    total = math.nan if online is None else online.delta_h1
    inside = kept.folder.relative_to(folder).as_posix() if kept.folder.is_relative_to(folder) else str(kept.folder)
    return StepRow(
        kept.step,
        printable("" if inside == "." else inside, PATH),
        _known(split.get("direct", math.nan), math.nan),
        _known(total, math.nan if online is None else online.std_error),
        kept.probed,
    )


def _part(name: str, entries: Sequence[LedgerEntry], found: Calibration) -> CalibrationPart:
    title, about = ABOUT[name]
    rows = [
        LedgerRow(
            entry.step,
            with_error(entry.forecast, entry.std_error),
            _known(entry.realised, entry.realised_error),
            "" if math.isnan(entry.realised - entry.forecast) else signed(entry.realised - entry.forecast),
        )
        for entry in entries[-MOST_ROWS:]
    ]
    return CalibrationPart(
        title,
        about,
        printable(found.verdict, 2000),
        tuple(_facts(found)),
        steps_figure(entries, f"{title}: forecast and realised change of the entropy over {len(entries)} steps"),
        scatter_figure(entries, found, f"{title}: realised change against its forecast, {found.n} steps"),
        tuple(rows),
    )


def _facts(found: Calibration) -> list[tuple[str, str]]:
    facts = []
    if not math.isnan(found.slope):
        low, high = found.slope_interval
        between = "" if math.isnan(low) else f" (95 %: {plain(low)} to {plain(high)})"
        facts.append(("slope of realised on forecast", f"{plain(found.slope)}{between}"))
    if not math.isnan(found.coverage):
        low, high = found.coverage_interval
        facts.append(("within 1.96 errors", f"{found.coverage:.0%} (95 %: {low:.0%} to {high:.0%})"))
    if not math.isnan(found.bias):
        facts.append(("realised less forecast, on average", with_error(found.bias, found.bias_error)))
    if not math.isnan(found.correlation):
        facts.append(("correlation", plain(found.correlation)))
    facts.append(("steps with both", f"{found.n:,}"))
    return facts


def _known(value: float, error: float) -> str:
    return "" if math.isnan(value) else with_error(value, error)
