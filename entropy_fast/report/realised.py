"""A forecast beside what the step really did."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.split import Split
from entropy_fast.report.layout import grid
from entropy_fast.truth import RealisedChanges

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
        return
    console.print(Text("The step taken, the same responses scored again, the step put back:"))
    rows = [["of the step", "direct forecast", "found", "ratio", "found one way"]]
    for point in found.points:
        forecast = result.split.on_batch * point.eta
        ratio = f"{point.symmetric.direct / forecast:.5f}" if forecast and not point.below_floor else "below floor"
        halved = point.symmetric.direct
        rows.append([f"{point.eta:g}", f"{forecast:+.5g}", f"{halved:+.5g}", ratio, f"{point.direct:+.5g}"])
    for line in grid(rows):
        console.print(Text(line))


def _print_table(split: Split, found: RealisedChanges, console: Console) -> None:
    table = Table(title="The step taken, responses scored again, the step put back", title_justify="left")
    columns = ["of the step", "direct, forecast", "found, ± step halved", "ratio", "found, one way", "second order"]
    with_total = not math.isnan(found.points[0].total)
    columns += ["total, forecast", "found, one way", "ESS", "Pareto k"] if with_total else []
    for column in columns:
        table.add_column(column, justify="right")
    for point in found.points:
        forecast = split.on_batch * point.eta
        ratio = f"{point.symmetric.direct / forecast:.5f}" if forecast and not point.below_floor else "below floor"
        cells = [
            f"{point.eta:g}",
            f"{forecast:+.6g}",
            f"{point.symmetric.direct:+.6g}",
            ratio,
            f"{point.direct:+.6g}",
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
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(
        Text(f"the step at 1: {found.geometry}, learning rate {found.learning_rate:g}; floor {found.floor:.2g}")
    )
