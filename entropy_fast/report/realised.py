"""A forecast beside what the step really did."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.split import Split
from entropy_fast.report.layout import grid
from entropy_fast.report.validation import BOTH_WAYS
from entropy_fast.truth import RealisedChange, RealisedChanges

__all__ = ["print_realised"]


def print_realised(result: DeltaH1Result, found: RealisedChanges, console: Console, *, verbose: bool = False) -> None:
    """Forecast and found, multiple by multiple of the step; nothing where the result has no parts.

    Args:
        result: the forecast.
        found: what its step did.
        console: where to.
        verbose: one way and both, the second order, and the total where it was measured.
    """
    if result.split is None:
        return
    if verbose:
        _print_table(result.split, found, console)
    else:
        _print_lines(result.split, found, console)
    if math.isnan(found.points[0].total):
        console.print(Text("This tests the direct part alone, at these responses, not the visitation part."))


def _print_lines(split: Split, found: RealisedChanges, console: Console) -> None:
    console.print(Text("The step taken, the same responses scored again, the step put back:"))
    rows = [["of the step", "direct forecast", "step taken", "both ways", "both ways / forecast"]]
    for point in found.points:
        forecast = split.on_batch * point.eta
        ratio = f"{point.symmetric.direct / forecast:.5f}" if forecast and not point.below_floor else "below floor"
        halved = point.symmetric.direct
        rows.append([f"{point.eta:g}", f"{forecast:+.5g}", f"{point.direct:+.5g}", f"{halved:+.5g}", ratio])
    for line in grid(rows):
        console.print(Text(line))
    console.print(Text(f"Both ways: {BOTH_WAYS}."))


def _print_table(split: Split, found: RealisedChanges, console: Console) -> None:
    table = Table(title="The step taken, responses scored again, the step put back", title_justify="left")
    columns = ["of the step", "direct, forecast", "step taken", "both ways", "both ways / forecast", "second order"]
    with_total = not math.isnan(found.points[0].total)
    columns += ["total, forecast", "total, step taken", "ESS", "Pareto k"] if with_total else []
    rows = [_cells(point, split, with_total) for point in found.points]
    for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
        # Headings are broken at words, so that no number is cut on a terminal of 80 columns.
        table.add_column(column, justify="right", width=max(map(len, [*column.split(), *cells])))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(f"Both ways: {BOTH_WAYS}."))
    console.print(
        Text(f"the step at 1: {found.geometry}, learning rate {found.learning_rate:g}; floor {found.floor:.2g}")
    )


def _cells(point: RealisedChange, split: Split, with_total: bool) -> list[str]:
    forecast = split.on_batch * point.eta
    ratio = f"{point.symmetric.direct / forecast:.5f}" if forecast and not point.below_floor else "below floor"
    cells = [
        f"{point.eta:g}",
        f"{forecast:+.6g}",
        f"{point.direct:+.6g}",
        f"{point.symmetric.direct:+.6g}",
        ratio,
        f"{point.second_order:+.3g}",
    ]
    if with_total:
        total = split.total
        cells += [
            f"{total.value * point.eta:+.3g} ± {total.std_error * point.eta:.2g}",
            f"{point.total:+.3g} ± {point.total_std_error:.2g}",
            f"{point.ess:.0%}",
            "unknown" if math.isnan(point.pareto_k) else f"{point.pareto_k:.2f}",
        ]
    return cells
