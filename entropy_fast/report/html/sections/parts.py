"""Where the change comes from: direct and visitation, the parts of the step, other updates, other functionals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.split import UpdateForecasts
from entropy_fast.report.html.intervals import IntervalFigure, Named, interval_figure
from entropy_fast.report.html.numbers import signed, with_error
from entropy_fast.report.text import printable

__all__ = [
    "CandidateRow",
    "CandidateSection",
    "PartsSection",
    "candidate_section",
    "functional_rows",
    "parts_section",
    "step_section",
]

NAME = 48  # characters of a name that a user gave
DIRECT = "how the distributions change at the prefixes that are visited today"
VISITATION = "how often prefixes are visited"
STEP_PARTS = {
    "momentum": "older gradients, kept by the optimizer",
    "decay": "weight decay",
    "fresh": "this batch's gradient",
    "scale": "what this gradient changes of Adam's √v̂, by which the step is divided",
}


@dataclasses.dataclass(frozen=True)
class PartsSection:
    """Parts of a change with their intervals.

    Attributes:
        figure: a row for every part.
        on_batch: derivative of this very batch's entropy at its own prefixes; empty where it is not known.
        such_updates: name and error of every part for such updates on average, in place of this very one.
    """

    figure: IntervalFigure
    on_batch: str
    such_updates: tuple[tuple[str, str], ...]


def parts_section(result: DeltaH1Result) -> PartsSection:
    """Direct, visitation and total; the one forecast there is with the score function."""
    split = result.split
    if split is None:
        named = [Named("Change", "first order, not taken apart", result.forecast)]
    else:
        named = [Named("Direct", DIRECT, split.direct)]
        if not math.isnan(split.total.value):
            named += [Named("Visitation", VISITATION, split.visitation), Named("Total", "both together", split.total)]
    such = [
        (one.label, with_error(one.forecast.value, one.forecast.population_std_error))
        for one in named
        if not math.isnan(one.forecast.population_std_error)
    ]
    on_batch = "" if split is None or math.isnan(split.on_batch) else signed(split.on_batch)
    return PartsSection(interval_figure(named, result.unit, result.entropy_level), on_batch, tuple(such))


def step_section(result: DeltaH1Result) -> tuple[tuple[str, IntervalFigure], ...]:
    """What each part of the optimizer's step does: to the direct part, and in all. Empty under ``adam_static``."""
    found = []
    for title, pick in _asked_for(result):
        parts = {name: pick(part) for name, part in result.step_parts.items()}
        named = [
            Named(name.capitalize(), STEP_PARTS.get(name, ""), one)
            for name, one in parts.items()
            if one is not None and not math.isnan(one.value)
        ]
        if named:
            found.append((title, interval_figure(named, result.unit, result.entropy_level)))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class CandidateRow:
    """One update, and what it would do to functionals, in the order of their names."""

    label: str
    functionals: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CandidateSection:
    """Updates compared.

    Attributes:
        figures: title and intervals, for the direct part and for the total, a row for every update.
        functionals: names of other functionals.
        rows: of them.
    """

    figures: tuple[tuple[str, IntervalFigure], ...]
    functionals: tuple[str, ...]
    rows: tuple[CandidateRow, ...]


def candidate_section(result: DeltaH1Result) -> CandidateSection | None:
    """The planned update beside the others; None where there are no others."""
    if not result.updates:
        return None
    planned = UpdateForecasts(result.forecast, result.split, result.functionals)
    updates = {"planned": planned} | {printable(name, NAME): found for name, found in result.updates.items()}
    figures = []
    for title, pick in _asked_for(result):
        named = [(name, pick(found)) for name, found in updates.items()]
        rows = [Named(name, "", one) for name, one in named if one is not None and not math.isnan(one.value)]
        if rows:
            figures.append((title, interval_figure(rows, result.unit, result.entropy_level)))
    names = tuple(result.functionals)
    rows_of = [
        CandidateRow(name, tuple(_known(found.functionals, of) for of in names)) for name, found in updates.items()
    ]
    return CandidateSection(tuple(figures), tuple(printable(name, NAME) for name in names), tuple(rows_of))


def functional_rows(result: DeltaH1Result) -> tuple[tuple[str, str, str, str], ...]:
    """Name, forecast with its error for this update, its interval, and the error for such updates."""
    return tuple(
        (
            printable(name, NAME),
            with_error(found.value, found.std_error),
            " to ".join(map(signed, found.interval())) if not math.isnan(found.std_error) else "",
            with_error(found.value, found.population_std_error) if not math.isnan(found.population_std_error) else "",
        )
        for name, found in result.functionals.items()
    )


def _asked_for(result: DeltaH1Result) -> list[tuple[str, Callable[[UpdateForecasts], Forecast | None]]]:
    """Titles of what was asked for, and where it is."""
    found: list[tuple[str, Callable[[UpdateForecasts], Forecast | None]]] = []
    if result.split is not None:
        found.append(("At the prefixes visited today", _direct))
    if result.estimate_options.wanted_parts != ("direct",):
        found.append(("In all", _whole))
    return found


def _direct(found: UpdateForecasts) -> Forecast | None:
    return None if found.split is None else found.split.direct


def _whole(found: UpdateForecasts) -> Forecast | None:
    return found.forecast


def _known(found: Mapping[str, Forecast], name: str) -> str:
    return with_error(found[name].value, found[name].std_error) if name in found else ""
