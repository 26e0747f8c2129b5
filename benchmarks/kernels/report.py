"""Tables for the console and for files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.kernels.copy_limit import COPY
from benchmarks.kernels.measure import Measured
from benchmarks.kernels.targets import Outcome
from benchmarks.kernels.timing import Spread

Rows = list[list[str]]
TARGET_HEADER = ["op", "backend", "number", "target", "measured", ""]
DISPATCH_HEADER = ["call", "µs"]


def header(backends: list[str]) -> list[str]:
    ratios = [f"time / {name}" for name in backends]
    return ["contender", "ms (quartiles)", *ratios, "GB/s", "GFLOP/s", "of limit", "of copy", "extra memory"]


def significant(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _spread(spread: Spread, scale: float = 1.0) -> str:
    median, low, high = (significant(scale * v) for v in (spread.median, spread.low, spread.high))
    return f"{median} ({low}-{high})"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def rows(measured: Measured) -> Rows:
    """One per contender. Those that are wrong have a complaint where others have numbers."""
    backends, table = measured.backends(), []
    for name, kind in measured.kinds.items():
        label = f"limit: {name}" if kind == "limit" else name
        memory = measured.extra_memory.get(name)
        in_words = "" if memory is None else f"{memory / 2**20:.1f} MiB"
        if name not in measured.times:
            table.append([label, *[""] * (len(backends) + 5), in_words])
            continue
        rate = measured.rate(name)
        ratios = [measured.ratio(name, backend) for backend in backends]
        table.append(
            [
                label,
                _spread(Spread.of(measured.times[name]), 1e3),
                *(_spread(r) if r else "" for r in ratios),
                significant(measured.bandwidth(name) / 1e9) if kind == "backend" or name in (COPY, "z.sum()") else "",
                "" if rate is None else significant(rate / 1e9),
                "100 %" if name == measured.limited_by else _share(measured.of_limit(name)),
                "100 %" if name == COPY else _share(measured.of_copy(name)) if kind != "rival" else "",
                in_words,
            ]
        )
    blank = [""] * (len(backends) + 5)
    table += [[name, f"WRONG: {complaint}", *blank] for name, complaint in measured.wrong.items()]
    table += [[name, reason, *blank] for name, reason in measured.missing.items()]
    return table


def target_rows(outcomes: list[Outcome]) -> Rows:
    table = []
    for outcome in outcomes:
        target, unit = outcome.target, outcome.target.unit
        gap = "" if unit == "x" else " "
        value = outcome.detail if outcome.measured is None else f"{significant(outcome.measured)}{gap}{unit}"
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}{gap}{unit}"
        spec = target.spec
        table.append(
            [f"{spec.op} {spec.dtype} {spec.shape}", outcome.backend, target.text, bound, value, outcome.verdict]
        )
    return table


def dispatch_rows(costs: dict[str, float]) -> Rows:
    return [[name, significant(1e6 * seconds)] for name, seconds in costs.items()]


def print_table(console: Console, title: str, head: list[str], body: Rows) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    console.print(table)


def markdown_table(head: list[str], body: Rows) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(
    machine: dict[str, object], measured: list[Measured], outcomes: list[Outcome], costs: dict[str, float]
) -> str:
    """The whole report."""
    parts = ["# Kernel benchmark", "\n".join(f"- {key}: {value}" for key, value in machine.items())]
    if outcomes:
        parts += ["## Targets", markdown_table(TARGET_HEADER, target_rows(outcomes))]
    for m in measured:
        parts += [f"## {m.spec.label}", markdown_table(header(m.backends()), rows(m))]
        notes = [f"- {name}: {note}" for name, note in m.notes.items() if note]
        if m.busy_elsewhere is not None:
            notes.append(f"- other processes kept {m.busy_elsewhere:.2f} cores busy meanwhile")
        parts.append("\n".join(notes))
    if costs:
        parts += ["## Cost of a call", markdown_table(DISPATCH_HEADER, dispatch_rows(costs))]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(
    machine: dict[str, object],
    options: dict[str, object],
    measured: list[Measured],
    outcomes: list[Outcome],
    costs: dict[str, float],
) -> str:
    """Everything, with every single time."""
    content = {
        "machine": machine,
        "options": options,
        "targets": [
            {
                "spec": o.target.spec.label,
                "backend": o.backend,
                "number": o.target.text,
                "bound": o.target.bound,
                "at_least": o.target.at_least,
                "unit": o.target.unit,
                "measured": o.measured,
                "verdict": o.verdict,
            }
            for o in outcomes
        ],
        "measured": [
            {**dataclasses.asdict(m), "label": m.spec.label, "of_limit": {n: m.of_limit(n) for n in m.times}}
            for m in measured
        ],
        "dispatch_seconds": costs,
    }
    return json.dumps(content, indent=1) + "\n"


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path
