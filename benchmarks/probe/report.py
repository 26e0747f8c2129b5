"""Tables for the console and for files, and the JSON that both are made from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.kernels.report import Rows, markdown_table, significant
from benchmarks.kernels.timing import Spread
from benchmarks.probe.contenders import baseline
from benchmarks.probe.growth import Growth
from benchmarks.probe.measure import Measured
from benchmarks.probe.profile import Profile
from benchmarks.probe.stages import STAGES
from benchmarks.probe.targets import Outcome

TARGET_HEADER = ["workload", "number", "target", "measured", ""]
GROWTH_HEADER = ["what grows", "sizes", "seconds", "exponent", "share of L²", "exponent without it"]
PROFILE_HEADER = ["stage", "seconds", "share"]
OPERATIONS_HEADER = ["part", "10⁹ operations"]


def header(measured: Measured) -> list[str]:
    step = "plain steps" if measured.workload.batches == 1 else "plain steps a batch"
    speed_up = f"{baseline(measured.workload.batches)} / this"
    return ["", "seconds (quartiles)", "rounds", step, speed_up, "peak MiB", "of plain step's"]


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    median, low, high = (significant(v) for v in dataclasses.astuple(spread))
    return median if median == low == high else f"{median} ({low}-{high})"


def rows(measured: Measured) -> Rows:
    """One per contender; those that are wrong or cannot run have the reason where others have numbers."""
    table = []
    for name in measured.notes:
        peak, relative = measured.peaks.get(name), measured.memory_in_plain_steps(name)
        table.append(
            [
                name,
                _spread(Spread.of(measured.times[name])),
                str(measured.rounds[name]),
                _spread(measured.in_plain_steps(name)),
                _spread(measured.speed_up(name)),
                "" if peak is None else f"{peak / 2**20:.0f}",
                "" if relative is None else significant(relative),
            ]
        )
    table += [[name, f"WRONG, no speed: {complaint}", *[""] * 5] for name, complaint in measured.wrong.items()]
    table += [[name, f"cannot run: {reason}", *[""] * 5] for name, reason in measured.missing.items()]
    return table


def title(measured: Measured) -> str:
    prompt, response = measured.tokens
    return f"{measured.workload.name}: {measured.workload.label}; {prompt} prompt and {response} response tokens"


def target_rows(outcomes: list[Outcome]) -> Rows:
    table = []
    for o in outcomes:
        value = "" if o.measured is None else significant(o.measured)
        text = f"{value} ({o.detail})" if o.detail and value else o.detail or value
        table.append([o.subject, o.number, f"{'≥' if o.at_least else '≤'} {o.bound:g}", text, o.verdict])
    return table


def growth_rows(grown: list[Growth]) -> Rows:
    table = []
    for g in grown:
        of_rest = "" if g.exponent_of_the_rest is None else f"{g.exponent_of_the_rest:.2f}"
        share = "" if g.quadratic_share is None else f"{100 * g.quadratic_share:.0f} %"
        sizes, seconds = ", ".join(map(str, g.axis.sizes)), ", ".join(map(significant, g.seconds))
        table.append([g.axis.label, sizes, seconds, f"{g.exponent:.2f}", share, of_rest])
    return table


def profile_rows(profile: Profile) -> Rows:
    return [
        [stage, significant(profile.stages[stage]), f"{100 * profile.stages[stage] / profile.profiled_seconds:.0f} %"]
        for stage in STAGES
    ]


def profile_sentence(profile: Profile) -> str:
    return (
        f"{profile.workload.name}: {significant(profile.seconds)} s a call ({significant(profile.profiled_seconds)} s under "
        f"the clock); {significant(profile.operations.total / 1e9)} x 10⁹ necessary operations, "
        f"{significant(100 * profile.of_gemm_rate)} % of the {profile.gemm_rate / 1e9:.0f} GFLOP/s that a float32 matrix "
        "product reaches."
    )


def operations_rows(profile: Profile) -> Rows:
    parts = dataclasses.asdict(profile.operations)
    return [[name.replace("_", " "), significant(value / 1e9)] for name, value in parts.items()]


@dataclasses.dataclass
class Everything:
    """What one run of the command found.

    Attributes:
        machine: `benchmarks.kernels.machine.description`.
        settings: the command's options.
        measured: by workload.
        grown: by what grows.
        profiles: by workload.
        outcomes: of all targets.
    """

    machine: dict[str, object]
    settings: dict[str, object]
    measured: list[Measured] = dataclasses.field(default_factory=list)
    grown: list[Growth] = dataclasses.field(default_factory=list)
    profiles: list[Profile] = dataclasses.field(default_factory=list)
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)


def as_json(found: Everything) -> str:
    """All single times, and the finished rows of every table, so that documents need compute nothing."""
    workloads = [
        dataclasses.asdict(m) | {"title": title(m), "header": header(m), "rows": rows(m)} for m in found.measured
    ]
    profiles = [
        dataclasses.asdict(p)
        | {"of_gemm_rate": p.of_gemm_rate, "sentence": profile_sentence(p), "rows": profile_rows(p)}
        | {"operations_rows": operations_rows(p)}
        for p in found.profiles
    ]
    content: dict[str, Any] = {
        "machine": found.machine,
        "settings": found.settings,
        "workloads": workloads,
        "growth": [dataclasses.asdict(g) for g in found.grown],
        "growth_rows": growth_rows(found.grown),
        "profiles": profiles,
        "targets": [dataclasses.asdict(o) | {"verdict": o.verdict} for o in found.outcomes],
        "target_rows": target_rows(found.outcomes),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def markdown(content: dict[str, Any]) -> dict[str, str]:
    """The tables by name, from what `as_json` wrote."""
    machine, settings = content["machine"], content["settings"]
    slow = min(settings["repeat"], settings["slow_repeat"])
    busy = max((w["busy_elsewhere"] or 0 for w in content["workloads"]), default=0)
    parts = {
        "probe-machine": (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['threads']} threads. "
            f"Python {machine['python']}, torch {machine['torch']}.\nCommit {machine['commit'][:10]}; "
            f"{machine['date'][:10]}; rounds: {settings['repeat']}, of what is slow {slow}. While any one workload was timed, "
            f"other processes\nkept at most {busy:.2f} cores busy."
        ),
        "probe-targets": markdown_table(TARGET_HEADER, content["target_rows"]),
        "probe-workloads": "\n\n".join(
            f"{w['title']}:\n\n{markdown_table(w['header'], w['rows'])}" for w in content["workloads"]
        ),
    }
    if content["growth_rows"]:
        parts["probe-growth"] = markdown_table(GROWTH_HEADER, content["growth_rows"])
    if content["profiles"]:
        parts["probe-profile"] = "\n\n".join(
            f"{p['sentence']}\n\n{markdown_table(PROFILE_HEADER, p['rows'])}" for p in content["profiles"]
        )
    return parts


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name
