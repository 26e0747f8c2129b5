"""A result on the terminal: one screen, and the tables of everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_fast.estimates.attribution import SequenceContributions
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.split import Split, UpdateForecasts
from entropy_fast.report.screen import print_screen, prompt_label
from entropy_fast.report.text import printable

__all__ = ["print_result"]

PROMPTS_SHOWN = 10
SEQUENCES_SHOWN = 5
PROMPT_CELLS = 60  # of a prompt's text
EXPLANATION = 2000  # characters at most


def print_result(result: DeltaH1Result, console: Console, *, verbose: bool = False) -> None:
    """The one screen, or under ``verbose`` everything that there is to a result."""
    print_screen(result, console)
    if verbose:
        console.print()
        _print_details(result, console)


def _print_details(result: DeltaH1Result, console: Console) -> None:
    console.print(Text(printable(result.explain(), EXPLANATION)))
    summary = Table(title="First-order entropy change of the next update", show_header=False, title_justify="left")
    summary.add_column(style="bold")
    summary.add_column()
    whole = not math.isnan(result.delta_h1)
    summary.add_row("δH₁" if whole else "direct part of δH₁", Text(f"{result.forecast.value:.17g}"))
    known, (lower, upper) = not math.isnan(result.forecast.std_error), result.forecast.interval(0.95)
    summary.add_row("standard error", Text(f"{result.forecast.std_error:.4g}" if known else "unknown"))
    summary.add_row("95% interval", Text(f"[{lower:.4g}, {upper:.4g}]" if known else "unknown"))
    summary.add_row("entropy now", Text(f"{result.entropy_level:.4g}"))
    summary.add_row("unit", Text(result.unit))
    summary.add_row("learning rate", Text(f"{result.learning_rate:.6g}"))
    summary.add_row("entropy", Text(result.entropy_functional))
    summary.add_row("engine, geometry, estimate", Text(f"{result.engine}, {result.geometry}, {result.estimate}"))
    summary.add_row("plan", Text(str(result.plan)))
    console.print(summary)
    if result.split is not None:
        console.print(_parts(result.split))
    if result.step_parts:
        console.print(_step_parts(result))
    if result.functionals:
        console.print(_functionals(result.functionals))
    if result.updates:
        console.print(_updates(result))
    console.print(_errors(result))
    console.print(_prompts(result))
    for role, shares in (result.by_sequence or {}).items():
        console.print(Text(_sequences(role, shares)))
    for warning in result.diagnostics.warnings:
        console.print(Text(f"note: {warning}", style="yellow"))


def _parts(split: Split) -> Table:
    table = Table(title="Where the change comes from", title_justify="left")
    for column in ("part", "forecast", "± this update", "± such updates", "about"):
        table.add_column(column)
    for name, part, about in (
        ("direct", split.direct, "distributions at the prefixes that are visited"),
        ("visitation", split.visitation, "how often prefixes are visited"),
        ("total", split.total, "both"),
    ):
        errors = [_known(error, ".3g") for error in (part.std_error, part.population_std_error)]
        table.add_row(Text(name), Text(_known(part.value, "+.4g")), *map(Text, errors), Text(about))
    table.add_row(
        Text("on this batch"),
        Text(f"{split.on_batch:+.4g}"),
        Text("none"),
        Text(""),
        Text("its own responses scored again"),
    )
    return table


STEP_PARTS = {
    "momentum": "older gradients",
    "decay": "weight decay",
    "fresh": "this batch's gradient",
    "scale": "what it changes of Adam's √v̂, by which the step is divided",
}


def _step_parts(result: DeltaH1Result) -> Table:
    """What each part of the optimizer's step does, ± its standard error for this update."""
    table = Table(title="What each part of the optimizer's step does", title_justify="left")
    whole = not math.isnan(result.delta_h1)
    for column in ("part", *(["total"] if whole else []), *(["direct"] if result.split else []), "about"):
        table.add_column(column)
    for name, found in result.step_parts.items():
        cells = [found.forecast] if whole else []
        cells += [found.split.direct] if found.split else []
        shown = [f"{_known(cell.value, '+.3g')} ± {_known(cell.std_error, '.2g')}" for cell in cells]
        table.add_row(Text(name), *map(Text, shown), Text(STEP_PARTS[name]))
    return table


def _functionals(functionals: Mapping[str, Forecast]) -> Table:
    table = Table(title="What else the update changes, per response", title_justify="left")
    for column in ("of", "forecast", "± this update", "± such updates"):
        table.add_column(column)
    for name, found in functionals.items():
        errors = [_known(error, ".3g") for error in (found.std_error, found.population_std_error)]
        table.add_row(Text(printable(name, 40)), Text(f"{found.value:+.4g}"), *map(Text, errors))
    return table


def _updates(result: DeltaH1Result) -> Table:
    """What each update would do to each functional, ± its standard error for that very update; and beyond the planned one."""
    table = Table(title="Updates compared", title_justify="left")
    planned = UpdateForecasts(result.forecast, result.split, result.functionals)
    rows = {"planned": planned, **result.updates}
    whole = not math.isnan(result.delta_h1)
    table.add_column("update")
    for name in (*(["entropy"] if whole else []), *(["direct part"] if result.split else []), *result.functionals):
        table.add_column(printable(name, 24))
    table.add_column("entropy beyond planned" if whole else "direct beyond planned")
    for name, found in rows.items():
        cells = [found.forecast] if whole else []
        cells += [found.split.direct] if found.split else []
        cells += list(found.functionals.values())
        table.add_row(
            Text(printable(name, 32)),
            *(Text(f"{_known(cell.value, '+.3g')} ± {_known(cell.std_error, '.2g')}") for cell in cells),
            Text(_beyond(result, name)),
        )
    return table


def _beyond(result: DeltaH1Result, name: str) -> str:
    found = result.compared.get(name)
    if found is None:
        return ""
    return f"{_known(found.forecast.value, '+.3g')} ± {_known(found.forecast.std_error, '.2g')}"


def _known(value: float, how: str) -> str:
    return "unknown" if math.isnan(value) else format(value, how)


def _errors(result: DeltaH1Result) -> Table:
    table = Table(title="Standard errors, and what each is about", title_justify="left")
    for column in ("method", "value", "about"):
        table.add_column(column)
    for error in result.diagnostics.standard_errors:
        value = "not defined here" if math.isnan(error.value) else f"{error.value:.4g}"
        table.add_row(Text(error.name), Text(value), Text(error.covers))
    return table


def _prompts(result: DeltaH1Result) -> Table:
    ranked = sorted(result.per_prompt, key=lambda p: -abs(p.delta_h1))
    table = Table(
        title=f"Prompts that matter most ({min(PROMPTS_SHOWN, len(ranked))} of {len(ranked)}): own entropy, where it changes; "
        "own update, who changes it",
        title_justify="left",
    )
    table.add_column("prompt", overflow="fold")
    for column in ("share of δH₁", "own entropy", "own update", "reward", "length"):
        table.add_column(column, justify="right")
    for p in ranked[:PROMPTS_SHOWN]:
        table.add_row(
            Text(prompt_label(p, PROMPT_CELLS)),
            *(Text(number) for number in (_number(p.delta_h1), _number(p.as_entropy), _number(p.as_update))),
            Text("" if p.mean_reward is None else f"{p.mean_reward:.2f}"),
            Text(f"{p.mean_response_length:.1f}"),
        )
    return table


def _sequences(role: str, shares: SequenceContributions) -> str:
    """The rows with the largest shares, on one line; the role is named in the two-batch estimate."""
    ranked = shares.delta_h1.abs().argsort(descending=True, stable=True)[:SEQUENCES_SHOWN].tolist()
    which = "" if role == "both" else f"[{role}] "
    shown = ", ".join(f"row {row} ({_number(float(shares.delta_h1[row]))})" for row in ranked)
    return f"{which}Sequences that matter most ({len(ranked)} of {len(shares.delta_h1)}): {shown}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3e}"
