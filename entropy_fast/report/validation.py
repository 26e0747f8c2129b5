"""A validation on the terminal, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_fast.atomic import atomic_path
from entropy_fast.report.glyphs import Glyphs, glyphs_of
from entropy_fast.report.layout import grid
from entropy_fast.report.picture import require_matplotlib
from entropy_fast.report.text import fitted, printable
from entropy_fast.truth import RealisedChange, Validation

__all__ = ["BOTH_WAYS", "print_validation", "summary", "validation_verdict", "write_validation_picture"]

BOTH_WAYS = "half of forward less backward, which is free of curvature"
FEWEST = 3  # multiples that a slope and R² are said of


def print_validation(name: str, found: Validation, console: Console, *, verbose: bool = False) -> None:
    """What follows, and what was forecast and found, multiple by multiple.

    Args:
        name: of the run.
        found: its validation.
        console: where to.
        verbose: both ways of taking the step, and every number there is.
    """
    glyphs = glyphs_of(console)
    console.print(Text(fitted(name, console.width, glyphs.cut)))
    console.print(Text(validation_verdict(found), style="bold"))
    if verbose:
        _print_tables(found, console)
        return
    for line in grid(_rows(found, glyphs)):
        console.print(Text(line))
    console.print(Text(f"Both ways: {BOTH_WAYS}."))
    if math.isnan(found.points[0].total):
        console.print(Text("This tests the direct part alone; the total takes other responses: --held-out."))


def validation_verdict(found: Validation) -> str:
    """One sentence: what was found over what was forecast, and how far the first order reaches."""
    if math.isnan(found.slope):
        return f"Every change is below what rounding leaves ({found.floor:.2g}): nothing can be said; use larger multiples."
    total = ""
    if not math.isnan(found.total_slope):
        total = f", and of the total forecast {found.total_slope:.3g}, standard error {found.total_slope_error:.2g}"
    return (
        f"Both ways the change is {found.slope:.4g} of the direct forecast on average up to the run's own step{total}; "
        f"{_reach(found)}, the run's own being {found.learning_rate:.3g}."
    )


def _reach(found: Validation) -> str:
    limit = found.ten_percent_off
    if math.isinf(limit):
        largest = max(point.eta for point in found.points) * found.learning_rate
        return f"the first order is nowhere 10 % off up to learning rate {largest:.3g}"
    if math.isnan(limit):
        least = min(point.eta for point in found.points) * found.learning_rate
        return f"the first order is more than 10 % off from learning rate {least:.3g}, the smallest tried, on"
    return f"the first order is 10 % off at learning rate {limit:.3g}"


def _rows(found: Validation, glyphs: Glyphs) -> list[list[str]]:
    """Per multiple the direct change, and the total one where it was measured; ratios are found / forecast."""
    direct, total, _ = found.forecast
    with_total = not math.isnan(found.points[0].total)
    rows = [["step", "direct forecast", "both ways", "ratio"]]
    if with_total:
        rows[0] += ["total forecast", f"taken {glyphs.plus_minus} s.e."]
    for point in found.points:
        forecast = direct * point.eta
        ratio = "below floor" if point.below_floor or not forecast else f"{point.symmetric.direct / forecast:.4f}"
        row = [f"{point.eta:g}", f"{forecast:+.4g}", f"{point.symmetric.direct:+.4g}", ratio]
        if with_total:
            known = f"{point.total:+.2g} {glyphs.plus_minus} {point.total_std_error:.1g}"
            row += [f"{total * point.eta:+.2g}", "unknown" if math.isnan(point.total) else known]
        rows.append(row)
    return rows


def _print_tables(found: Validation, console: Console) -> None:
    direct, total, error = found.forecast
    columns: tuple[str, ...] = ("step", "forecast", "step taken", "with 2nd order", "both ways", "ratio")
    rows = [_direct(point, direct) for point in found.points]
    console.print(_table(f"direct: at the prefixes of the batch, {found.unit}", columns, rows))
    if not math.isnan(found.points[0].total):
        rows = [_total(point, total, error) for point in found.points]
        columns = ("step", "forecast", "step taken", "ESS", "Pareto k")
        console.print(_table(f"total: on held-out responses, {found.unit}", columns, rows))
    console.print(Text(summary(found)))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _direct(point: RealisedChange, direct: float) -> list[str]:
    forecast = direct * point.eta
    ratios = ["below floor", "below floor"]
    if not point.below_floor and forecast:
        ratios = [f"{point.symmetric.direct / forecast:.5f}", f"{point.direct / (forecast + point.second_order):.5f}"]
    return [
        f"{point.eta:g}",
        f"{forecast:+.5g}",
        f"{point.direct:+.5g}",
        ratios[1],
        f"{point.symmetric.direct:+.5g}",
        ratios[0],
    ]


def _total(point: RealisedChange, total: float, error: float) -> list[str]:
    return [
        f"{point.eta:g}",
        f"{total * point.eta:+.3g} ± {error * point.eta:.2g}",
        f"{point.total:+.3g} ± {point.total_std_error:.2g}" + (" (fresh)" if point.fresh else ""),
        f"{point.ess:.0%}",
        "unknown" if math.isnan(point.pareto_k) else f"{point.pareto_k:.2f}",
    ]


def summary(found: Validation) -> str:
    """In sentences."""
    if math.isnan(found.slope):
        return f"Every change is below what rounding leaves ({found.floor:.2g}): nothing can be said; use larger multiples."
    own = min(found.points, key=lambda point: abs(math.log(point.eta)))
    line = ""
    if sum(not point.below_floor and point.eta <= 1 for point in found.points) >= FEWEST:
        line = f" Slope {found.slope:.5f} of both ways on forecast, R² {found.r_squared:.4f} of the step taken;"
    reach = _reach(found) if line else _reach(found).capitalize()
    one_way = own.direct / (own.eta * found.forecast[0])
    said = (
        f"Direct: the step taken changed the entropy by {own.direct:+.4g}, which is {one_way:.4f} of the forecast, and "
        f"{found.own_ratio:.4f} of it with the second order (the curvature) added.{line} {reach} (the run's own is "
        f"{found.learning_rate:.3g})."
    )
    if math.isnan(found.total_slope):
        return said
    return f"{said} Total: slope {found.total_slope:.3g} ± {found.total_slope_error:.2g} at the run's own step."


def write_validation_picture(found: Mapping[str, Validation], path: Path) -> Path:
    """Direct change over forecast by learning rate, and total found over total forecast, of several checkpoints.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = FigureCanvasAgg(figure).figure.subplots(1, 2)
    for name, one in found.items():
        direct, total, error = one.forecast
        seen = [p for p in one.points if not p.below_floor and direct]
        rates = [p.eta * one.learning_rate for p in seen]
        (line,) = left.plot(rates, [p.direct / (p.eta * direct) for p in seen], "o-", label=printable(name, 40))
        left.plot(rates, [p.symmetric.direct / (p.eta * direct) for p in seen], ":", color=line.get_color())
        own = min(one.points, key=lambda p: abs(math.log(p.eta)))
        if not math.isnan(own.total):
            right.errorbar(
                total,
                own.total / own.eta,
                xerr=error,
                yerr=own.total_std_error / own.eta,
                fmt="o",
                color=line.get_color(),
            )
    left.set_xscale("log")
    left.axhline(1, color="black", linewidth=0.8)
    left.axhspan(0.9, 1.1, color="0.9", zorder=0)
    left.set_xlabel("learning rate")
    left.set_ylabel("direct change found / forecast (dotted: both ways)")
    left.legend(fontsize=8)
    ends = [*right.get_xlim(), *right.get_ylim()]
    right.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8)
    right.set_xlabel("total change forecast at the run's own step, ± standard error")
    right.set_ylabel("found on held-out responses, ± standard error")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
