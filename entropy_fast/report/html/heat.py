"""A figure of a table of signed numbers by colour: one path for every step of the scale, so that large tables stay small."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from entropy_fast.report.html.numbers import signed
from entropy_fast.report.html.scales import LEVELS, level_of

__all__ = ["ColourStep", "HeatCell", "HeatLabel", "HeatMap", "Legend", "heat_map", "legend_of"]

NAMED_CELLS = 1000  # up to so many cells each one says its number when it is pointed at
MOST_LABELS = 48  # more do not fit beside one another
FEWER_LABELS = 12  # that fit on a narrow page


@dataclasses.dataclass(frozen=True)
class ColourStep:
    """The cells of one step of the scale.

    Attributes:
        name: of the step: ``l`` (lowers) or ``r`` (raises) and its number.
        path: in units of cells, for the attribute ``d``.
    """

    name: str
    path: str


@dataclasses.dataclass(frozen=True)
class HeatCell:
    """A cell that says its number; row and column count from 0."""

    row: int
    column: int
    text: str


@dataclasses.dataclass(frozen=True)
class HeatLabel:
    """A label in the middle of a row or column, in percent of the height or width; ``minor`` ones go where there is no room."""

    place: float
    text: str
    minor: bool


@dataclasses.dataclass(frozen=True)
class Legend:
    """What the steps of a scale stand for.

    Attributes:
        steps: names of all steps from the one that lowers most to the one that raises most, with nothing between.
        marks: numbers under its beginning, its quarters and its end.
        unit: of the numbers.
    """

    steps: tuple[str, ...]
    marks: tuple[str, ...]
    unit: str


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A table of numbers.

    Attributes:
        n_rows: rows; n_columns: columns.
        steps: the coloured cells.
        cells: cells with their numbers; empty where there are too many.
        row_labels: of the rows; column_labels: of the columns.
        legend: of the colours.
        title: what it is, in a sentence.
    """

    n_rows: int
    n_columns: int
    steps: tuple[ColourStep, ...]
    cells: tuple[HeatCell, ...]
    row_labels: tuple[HeatLabel, ...]
    column_labels: tuple[HeatLabel, ...]
    legend: Legend
    title: str


def heat_map(
    values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], *, unit: str, title: str
) -> HeatMap:
    """Colour a table.

    Args:
        values: [rows, columns]; NaN for cells that are left empty.
        rows: labels of the rows.
        columns: labels of the columns.
        unit: of the numbers.
        title: what it is.
    """
    known = np.abs(values[np.isfinite(values)])
    top = float(known.max()) if known.size else 0.0
    levels = np.vectorize(lambda value: level_of(float(value), top), otypes=[np.int64])(values)
    paths = {step: _path(levels == step) for step in range(-LEVELS, LEVELS + 1) if step}
    steps = [ColourStep(step_name(step), path) for step, path in paths.items() if path]
    cells = [
        HeatCell(i, j, f"{rows[i]}, {columns[j]}: {signed(float(values[i, j]))}")
        for i in range(len(rows))
        for j in range(len(columns))
        if np.isfinite(values[i, j])
    ]
    return HeatMap(
        len(rows),
        len(columns),
        tuple(steps),
        tuple(cells) if values.size <= NAMED_CELLS else (),
        _labels(rows),
        _labels(columns),
        legend_of(top, unit),
        title,
    )


def step_name(step: int) -> str:
    """The class of a step of the scale; empty for 0."""
    return "" if step == 0 else f"{'l' if step < 0 else 'r'}{abs(step)}"


def legend_of(largest: float, unit: str) -> Legend:
    """Of a scale whose strongest colour is of ``largest``; half of that colour is of a quarter (`level_of`)."""
    marks = tuple(signed(value, 2) for value in (-largest, -largest / 4, 0.0, largest / 4, largest))
    return Legend(tuple(step_name(n) for n in range(-LEVELS, LEVELS + 1)), marks, unit)


def _path(mask: NDArray[np.bool_]) -> str:
    """Cells as rectangles, neighbours in a row as one."""
    found = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        found += [f"M{start} {row}h{end - start}v1h-{end - start}z" for start, end in edges.reshape(-1, 2).tolist()]
    return "".join(found)


def _labels(names: Sequence[str]) -> tuple[HeatLabel, ...]:
    every, rarely = (max(1, -(-len(names) // most)) for most in (MOST_LABELS, FEWER_LABELS))
    rarely = -(-rarely // every) * every
    places = range(0, len(names), every)
    return tuple(HeatLabel(round(100 * (n + 0.5) / len(names), 3), names[n], n % rarely > 0) for n in places)
