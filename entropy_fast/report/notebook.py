"""What a notebook shows of a result: one small piece of HTML that needs nothing else and in which no text of others acts."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.held import entropy_units, parts_of
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.plots.labels import prompt_name
from entropy_fast.report.text import printable

__all__ = ["result_html"]

PROMPTS = 3
NOTES, NOTE = 6, 400  # notes shown, and characters of each
SENTENCE, LABEL = 600, 80  # characters
WIDTH, HEIGHT = 220, 16  # of a drawn interval, in pixels
COLOURS = {"direct": "#007F5F", "visitation": "#AA4499", "total": "currentColor"}
TABLE = "border-collapse:collapse;margin:4px 0;color:inherit;font-size:inherit"
CELL = "text-align:left;padding:2px 12px 2px 0;border:0"


def result_html(result: DeltaH1Result) -> str:
    """The verdict, the parts with their intervals drawn, the prompts that matter most, and notes."""
    pieces = [
        f'<p style="max-width:60em;margin:0 0 6px"><b>{_text(result.verdict.sentence, SENTENCE)}</b></p>',
        f'<p style="margin:0 0 4px">The entropy now: {result.entropy_level:.3g} {_text(result.unit, 60)}.</p>',
        _parts(result),
        _prompts(result),
        _notes(result.diagnostics.warnings),
        f'<p style="margin:4px 0;opacity:.65">{_text(result.entropy_functional, 200)}; engine {_text(result.engine, 40)}, '
        f"{_text(result.geometry, 40)}. Figures: <code>result.plot()</code>; tables: "
        "<code>result.to_dataframe(kind)</code>.</p>",
    ]
    return f'<div style="font-size:90%;line-height:1.4">{"".join(pieces)}</div>'


def _text(text: str, limit: int) -> str:
    """Without control and format characters, cut, and escaped for HTML."""
    return html.escape(printable(text, limit))


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else format(value, "+.3g").replace("-", "\N{MINUS SIGN}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of cells that are HTML already."""
    top = "".join(f'<th scope="col" style="{CELL}">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<table style="{TABLE}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _parts(result: DeltaH1Result) -> str:
    parts = parts_of(result)
    ends = [end for part in parts.values() for end in (*part.interval(), part.value) if math.isfinite(end)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    head = (_text(result.unit, 60), "forecast", "95 % interval", "")
    return _table(head, (_part(name, part, low, high) for name, part in parts.items()))


def _part(name: str, part: Forecast, low: float, high: float) -> list[str]:
    ends = [_number(end) for end in part.interval()]
    interval = "unknown" if math.isnan(part.std_error) else f"[{ends[0]}, {ends[1]}]"
    return [name, _number(part.value), interval, _drawn(name, part, low, high)]


def _drawn(name: str, part: Forecast, low: float, high: float) -> str:
    """The point, its interval where there is one, and a line at 0; hollow where the sign is not established."""
    if high == low:
        return ""

    def x(value: float) -> str:
        return f"{8 + (value - low) / (high - low) * (WIDTH - 16):.1f}"

    colour, middle, pieces = COLOURS[name], HEIGHT / 2, []
    pieces.append(f'<line x1="{x(0)}" x2="{x(0)}" y1="0" y2="{HEIGHT}" stroke="currentColor" stroke-opacity=".4"/>')
    start, end = part.interval()
    if not math.isnan(start):
        ends = f'x1="{x(start)}" x2="{x(end)}" y1="{middle}" y2="{middle}"'
        pieces.append(f'<line {ends} stroke="{colour}" stroke-width="2"/>')
    fill = "1" if part.established else "0"
    pieces.append(
        f'<circle cx="{x(part.value)}" cy="{middle}" r="4" fill="{colour}" fill-opacity="{fill}" stroke="{colour}" '
        'stroke-width="1.5"/>'
    )
    return f'<svg width="{WIDTH}" height="{HEIGHT}" aria-hidden="true">{"".join(pieces)}</svg>'


def _prompts(result: DeltaH1Result) -> str:
    units = sorted(entropy_units(result), key=lambda unit: -abs(unit.delta_h1))[:PROMPTS]
    rows = [[html.escape(prompt_name(unit, LABEL)), _number(unit.delta_h1)] for unit in units]
    return _table(("prompts that matter most", "share"), rows)


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    shown = [f"<li>{_text(note, NOTE)}</li>" for note in notes[:NOTES]]
    if len(notes) > NOTES:
        shown.append(f"<li>and {len(notes) - NOTES} more in <code>result.diagnostics.warnings</code></li>")
    count = f"{len(notes)} note{'s' if len(notes) > 1 else ''}"
    return f"<details><summary>{count}</summary><ul>{''.join(shown)}</ul></details>"
