"""A result on one screen: the verdict, the numbers that it rests on, and what to look at next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.text import Text

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.held import parts_of
from entropy_fast.estimates.result import DeltaH1Result, PromptContribution
from entropy_fast.estimates.verdict import percent_of, shown_percent
from entropy_fast.report.glyphs import Glyphs, glyphs_of
from entropy_fast.report.layout import grid, grid_that_fits, wrapped
from entropy_fast.report.scale import Scale
from entropy_fast.report.text import cell_width, fitted

__all__ = ["print_screen", "prompt_label"]

PROMPTS = ("1st", "2nd", "3rd")  # letters first: right-to-left text after them does not turn their line around
UPDATES = FUNCTIONALS = 3  # shown at most
NOTES, NOTE_LINES = 3, 2
SENTENCE_LINES = 12  # of our own: room for every width
NARROWEST, WIDEST = 16, 72  # cells of the drawn scale
LEVEL = 0.95
STEPS = {"next_step": "the optimizer's whole next step", "adam_static": "Adam's static geometry, without momentum"}


def print_screen(result: DeltaH1Result, console: Console) -> None:
    """About 24 lines at 80 columns. At 80 and more none is wider than the console.

    Every ± is one standard error for this very update.
    """
    glyphs = glyphs_of(console)
    console.print(wrapped(result.verdict.sentence, console, lines=SENTENCE_LINES, cut=glyphs.cut), style="bold")
    console.print(wrapped(_level(result), console, lines=SENTENCE_LINES, cut=glyphs.cut))
    for line in _parts(result, console.width, glyphs):
        console.print(line)
    for text in (*_step_parts(result, console.width, glyphs), *_updates(result, glyphs)):
        console.print(Text(text))
    if result.functionals:
        console.print(wrapped(_functionals(result.functionals, glyphs), console, lines=SENTENCE_LINES, cut=glyphs.cut))
    for line in _prompts(result, console.width, glyphs):
        console.print(line)
    _print_notes(result, console, glyphs)


def _level(result: DeltaH1Result) -> str:
    return (
        f"Entropy now {result.entropy_level:.4g} {result.unit} ({result.entropy_functional}). "
        f"The step is {STEPS[result.geometry]}, at learning rate {result.learning_rate:.3g}."
    )


def _parts(result: DeltaH1Result, width: int, glyphs: Glyphs) -> Iterator[Text]:
    """Direct part, visitation part and total, each with its interval in numbers and on one scale."""
    forecasts = parts_of(result)
    rows = [["", "change", "95 % interval", "of now"]]
    for name, found in forecasts.items():
        percent = percent_of(found.value, result.entropy_level)
        shown = "" if math.isnan(percent) else shown_percent(percent)
        rows.append([name, f"{found.value:+.3g}", _interval(found), shown])
    lines = grid(rows)
    taken = max(map(cell_width, lines)) + 3
    if width - taken < NARROWEST:
        yield from map(Text, lines)
        return
    ends = [number for found in forecasts.values() for number in (found.value, *found.interval(LEVEL))]
    scale = Scale.of(ends, min(width - taken, WIDEST))
    drawn = [scale.header(), *(scale.row(f.value, f.interval(LEVEL), glyphs) for f in forecasts.values())]
    for line, picture in zip(lines, drawn, strict=True):
        yield Text(line + " " * (taken - cell_width(line)) + picture.rstrip())


def _interval(found: Forecast) -> str:
    low, high = found.interval(LEVEL)
    return "unknown" if math.isnan(low) else f"[{low:+.3g}, {high:+.3g}]"


def _with_error(found: Forecast, glyphs: Glyphs, digits: int = 3) -> str:
    """An estimate and its standard error."""
    if math.isnan(found.value):
        return "unknown"
    error = "unknown" if math.isnan(found.std_error) else f"{found.std_error:.2g}"
    return f"{found.value:+.{digits}g} {glyphs.plus_minus} {error}"


def _step_parts(result: DeltaH1Result, width: int, glyphs: Glyphs) -> list[str]:
    """What momentum, decay, the fresh gradient and its effect on the optimizer's scale do, by part of the change."""
    if not result.step_parts:
        return []
    rows = [[f"step by, {glyphs.plus_minus} standard error", *result.step_parts]]
    for part in _shown(parts_of(result)):
        found = [parts_of(result, own)[part] for own in result.step_parts.values()]
        rows.append([part, *(_with_error(own, glyphs, 2) for own in found)])
    return grid_that_fits(rows, width)


def _shown(parts: Iterable[str]) -> list[str]:
    """Those of the direct part and the total that there are: the one is known well, the other is both together."""
    return [part for part in parts if part != "visitation"]


def _functionals(functionals: Mapping[str, Forecast], glyphs: Glyphs) -> str:
    some = list(functionals.items())[:FUNCTIONALS]
    shown = [f"{fitted(name, 24, glyphs.cut)} {_with_error(found, glyphs)}" for name, found in some]
    more = len(functionals) - len(some)
    rest = f", and {more} more" if more else ""
    return f"Per response, {glyphs.plus_minus} standard error: {', '.join(shown)}{rest}."


def _updates(result: DeltaH1Result, glyphs: Glyphs) -> list[str]:
    """What the other updates would do instead."""
    if not result.updates:
        return []
    parts, some = _shown(parts_of(result)), list(result.updates.items())[:UPDATES]
    rows = [[f"instead, {glyphs.plus_minus} standard error", *parts]]
    for name, own in some:
        found = parts_of(result, own)
        rows.append([fitted(name, 32, glyphs.cut), *(_with_error(found[part], glyphs) for part in parts)])
    more = len(result.updates) - len(some)
    return [*grid(rows), *([f"and {more} more: --verbose"] if more else [])]


def _prompts(result: DeltaH1Result, width: int, glyphs: Glyphs) -> Iterator[Text]:
    """The prompts with the largest shares, one line each; their text comes last and takes what is left of the line."""
    ranked = sorted(result.per_prompt, key=lambda p: -abs(p.delta_h1))
    some = ranked[: len(PROMPTS)]
    of = "the direct part" if math.isnan(result.delta_h1) else "the total"
    # Along the whole step a share says where the entropy changes, and not whose update changes it.
    most = "Prompts whose entropy changes most" if result.step_parts else "Prompts that matter most"
    yield Text(f"{most} ({len(some)} of {len(ranked)}), share of {of}:")
    rows = []
    for place, prompt in zip(PROMPTS, some, strict=False):
        reward = "" if prompt.mean_reward is None else f"reward {prompt.mean_reward:.3g}"
        rows.append(
            [place, f"{prompt.delta_h1:+.3g}", *([reward] if any(p.mean_reward is not None for p in some) else [])]
        )
    lines = grid(rows)
    taken = max(map(cell_width, lines)) + 2
    for line, prompt in zip(lines, some, strict=True):
        label = prompt_label(prompt, max(width - taken, 0), glyphs.cut)
        yield Text(f"{line}{' ' * (taken - cell_width(line))}{label}".rstrip())


def prompt_label(prompt: PromptContribution, cells: int, cut: str = "…") -> str:
    """The prompt's text where there is one, its group ids otherwise; the role in front in the two-batch estimate.

    Args:
        prompt: whose.
        cells: of a terminal, that it may take.
        cut: at the end of one that was cut.
    """
    text = f"group {', '.join(map(str, prompt.group_ids))}" if prompt.prompt is None else prompt.prompt
    role = "" if prompt.role == "both" else f"[{prompt.role}] "
    return fitted(role + text, cells, cut)


def _print_notes(result: DeltaH1Result, console: Console, glyphs: Glyphs) -> None:
    """What bears on the forecast, each in two lines; how many others there are."""
    notes = result.diagnostics.bearing
    for note in notes[:NOTES]:
        console.print(wrapped(f"note: {note}", console, lines=NOTE_LINES, cut=glyphs.cut), style="yellow")
    more = len(result.diagnostics.warnings) - len(notes[:NOTES])
    if more:
        console.print(Text(f"{more} more note{'s' if more > 1 else ''}: --verbose"))
