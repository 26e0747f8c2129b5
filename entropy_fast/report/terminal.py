"""A result as rich tables."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_fast.estimates.attribution import SequenceContributions
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.result import DeltaH1Result, PromptContribution
from entropy_fast.estimates.split import Split, UpdateForecasts
from entropy_fast.report.text import printable

__all__ = ["print_result", "split_verdict", "verdict"]

PROMPTS_SHOWN = 10
SEQUENCES_SHOWN = 5
EXPLANATION = 2000  # characters at most


def verdict(result: DeltaH1Result) -> str:
    """What may be concluded about the sign, in words."""
    if math.isnan(result.delta_h1):
        return "The direct part alone was asked for: nothing can be said about the whole change."
    if math.isnan(result.std_error):
        return "There are too few prompts for a standard error: nothing can be said about the sign."
    if result.delta_h1 == 0:
        return "The forecast is exactly 0: see the notes."
    if result.sign_established:
        direction = "lower" if result.delta_h1 < 0 else "raise"
        return f"The sign is established at two standard errors: this update is expected to {direction} the entropy."
    return (
        "The sign is not established: |δH₁| is below two standard errors, or its 95% interval holds 0. With few prompts that "
        "is the usual case; probe more of them for a narrower interval."
    )


def split_verdict(split: Split) -> str:
    """What may be concluded about the direct part, in words."""
    what = "At the prefixes that the policy visits today, this update"
    direction = "lower" if split.direct.value < 0 else "raise"
    if split.direct.established is None:
        return f"{what} is forecast to {direction} the entropy; there are too few prompts to say how surely."
    if split.direct.established:
        return f"{what} is expected to {direction} the entropy; the sign of that part is established at 95%."
    return f"{what} may lower or raise the entropy: the sign of that part is not established."


def print_result(result: DeltaH1Result, console: Console) -> None:
    """Forecast, standard errors, the prompts that matter most, and warnings."""
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
    console.print(Text(verdict(result), style="bold"))
    if result.split is not None:
        console.print(_parts(result.split))
        console.print(Text(split_verdict(result.split)))
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
    "scale": "what it does to the optimizer's scale",
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
    """What each update would do to each functional, ± its standard error for that very update."""
    table = Table(title="Updates compared", title_justify="left")
    planned = UpdateForecasts(result.forecast, result.split, result.functionals)
    rows = {"planned": planned, **result.updates}
    whole = not math.isnan(result.delta_h1)
    table.add_column("update")
    for name in (*(["entropy"] if whole else []), *(["direct part"] if result.split else []), *result.functionals):
        table.add_column(printable(name, 24))
    for name, found in rows.items():
        cells = [found.forecast] if whole else []
        cells += [found.split.direct] if found.split else []
        cells += list(found.functionals.values())
        table.add_row(
            Text(printable(name, 32)),
            *(Text(f"{_known(cell.value, '+.3g')} ± {_known(cell.std_error, '.2g')}") for cell in cells),
        )
    return table


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
        title=f"Prompts that matter most ({min(PROMPTS_SHOWN, len(ranked))} of {len(ranked)})", title_justify="left"
    )
    table.add_column("prompt", overflow="fold")
    for column in ("share of δH₁", "own entropy", "own update", "reward", "length"):
        table.add_column(column, justify="right")
    for p in ranked[:PROMPTS_SHOWN]:
        table.add_row(
            Text(prompt_label(p)),
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


def prompt_label(prompt: PromptContribution, limit: int = 60) -> str:
    """The prompt's text where there is one, its group ids otherwise; the role in front in the two-batch estimate."""
    text = f"group {', '.join(map(str, prompt.group_ids))}" if prompt.prompt is None else prompt.prompt
    role = "" if prompt.role == "both" else f"[{prompt.role}] "
    return printable(role + text, limit)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3e}"
