"""One Markdown and one JSON from whatever rows there are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import rows
from benchmarks.gpu.runner import Files, Outcome, settled


def everything(settings: Mapping[str, object], outcomes: list[Outcome], files: Files) -> dict[str, object]:
    """The content of the JSON file: settings, one entry a stage, one a row."""
    by_name = {outcome.stage.name: outcome for outcome in outcomes}
    found = rows.read(files.rows)
    done = [row for name, outcome in by_name.items() for row in settled(outcome, [r for r in found if r.stage == name])]
    return {
        "settings": dict(settings),
        "stages": [
            {
                "name": o.stage.name,
                "title": o.stage.title,
                "status": o.status,
                "why": o.why,
                "seconds": round(o.seconds, 1),
                "limit": None if o.limit is None else round(o.limit, 1),
            }
            for o in outcomes
        ],
        "rows": [dataclasses.asdict(row) for row in done],
    }


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "\\`")


def _table(head: list[str], body: list[list[object]]) -> str:
    lines = [[_cell(c) for c in head], ["---"] * len(head), *([_cell(c) for c in line] for line in body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(content: dict[str, object]) -> str:
    """The page: how each stage went, what is not well and why, and every row."""
    stages, found, settings = content["stages"], content["rows"], content["settings"]
    assert isinstance(stages, list) and isinstance(found, list) and isinstance(settings, dict)
    parts = ["# GPU check", "\n".join(f"- {name}: {_cell(value)}" for name, value in settings.items())]
    if settings["size"] != "full":
        parts.append("Nothing about these sizes says how fast anything is.")
    head = ["stage", "status", "seconds", "limit", "why"]
    parts += ["## Stages", _table(head, [[s["name"], s["status"], s["seconds"], s["limit"], s["why"]] for s in stages])]
    not_well = [[r["stage"], r["name"], r["status"], r["why"]] for r in found if r["status"] != rows.OK]
    if not_well:
        parts += ["## Wrong, skipped or out of time", _table(["stage", "row", "status", "why"], not_well)]
    for stage in stages:
        # Rows with the same numbers share a table. Those without any have said why above.
        tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in found:
            if row["stage"] == stage["name"] and (row["values"] or row["status"] == rows.OK):
                tables.setdefault(tuple(row["values"]), []).append(row)
        if tables:
            parts.append(f"## {stage['title']}")
        for columns, own in tables.items():
            body = [[r["name"], r["status"], *r["values"].values(), r["seconds"]] for r in own]
            parts.append(_table(["row", "status", *columns, "took, s"], body))
    return "\n\n".join(parts) + "\n"


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def write(settings: Mapping[str, object], outcomes: list[Outcome], files: Files) -> None:
    content = everything(settings, outcomes, files)
    _replace(files.json, json.dumps(content, indent=1) + "\n")
    _replace(files.markdown, markdown(content))
