"""Put two runs into docs/performance.md: ``python -m benchmarks.kernels.document DIR DIR``.

Each DIR is what ``python -m benchmarks.kernels --out DIR`` wrote. Text between ``<!-- begin NAME -->`` and
``<!-- end NAME -->`` is replaced; the roofline picture of the first run is copied next to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.kernels import accumulate_problem, specs, token_logprobs_problem
from benchmarks.kernels.copy_limit import COPY
from benchmarks.kernels.report import DISPATCH_HEADER, markdown_table, significant
from benchmarks.kernels.targets import H100_BF16_PER_SECOND, H100_BYTES_PER_SECOND

DOCS = Path(__file__).parents[2] / "docs"
Run = dict[str, Any]
MEMORY_OF = ("native", "eager", "eager, chunked", "compiled", "cross_entropy", "cut-cross-entropy")


def _milliseconds(measured: Run, name: str) -> str:
    return significant(1e3 * statistics.median(measured["times"][name]))


def _over_native(measured: Run, name: str) -> str:
    times = measured["times"]
    pairs = zip(times[name], times.get("native", ()), strict=False)
    ratios = [a / b for a, b in pairs]
    return significant(statistics.median(ratios)) if ratios else ""


def machine_text(first: Run, second: Run) -> str:
    """Where the numbers come from."""
    machine = first["machine"]
    busy = " and ".join(f"{max(m['busy_elsewhere'] or 0 for m in run['measured']):.2f}" for run in (first, second))
    commits = dict.fromkeys(run["machine"]["commit"][:10] for run in (first, second))
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['cpu_flags'])}), {machine['memory_gib']} GiB; "
        f"{machine['threads']} threads.\nPython {machine['python']}, torch {machine['torch']}; native backend: "
        f"{machine['backends']['native']}.\nCommit {', '.join(commits)}; {machine['date'][:10]}. "
        f"Two runs, one after the other; while any one op was timed,\nother processes kept at most {busy} cores busy."
    )


def targets_table(first: Run, second: Run) -> str:
    """Both runs next to each target."""
    others = {(t["spec"], t["number"], t["backend"]): t for t in second["targets"]}
    body = []
    for target in first["targets"]:
        pair = (target, others[target["spec"], target["number"], target["backend"]])
        unit = "×" if target["unit"] == "x" else " %"
        numbers = ["" if t["measured"] is None else significant(t["measured"]) + unit for t in pair]
        verdict = " / ".join(dict.fromkeys(t["verdict"] for t in pair))
        bound = f"{'≥' if target['at_least'] else '≤'} {target['bound']:g}{unit}"
        body.append([target["spec"], target["number"], bound, *numbers, verdict])
    return markdown_table(["op", "number", "target", "run 1", "run 2", ""], body)


def _rate(measured: Run, name: str) -> str:
    seconds = statistics.median(measured["times"][name])
    if name == COPY:
        return f"{measured['copied_bytes'] / seconds / 1e9:.1f} GB/s"
    if measured["spec"]["op"] == specs.LINEAR:
        return f"{measured['operations'] / seconds / 1e9:.0f} GFLOP/s"
    if measured["kinds"][name] == "rival":
        return ""
    return f"{measured['moved_bytes'] / seconds / 1e9:.1f} GB/s"


def everything_table(first: Run, second: Run) -> str:
    """A line per op and contender."""
    others = {m["label"]: m for m in second["measured"] if m["spec"]["timed"]}
    body = []
    for measured in first["measured"]:
        label = measured["label"]
        runs = [m for m in (measured, others.get(label)) if m]
        for name in measured["times"]:
            kind, share = measured["kinds"][name], measured["of_limit"].get(name)
            both = [m for m in runs if name in m["times"]]
            memory = measured["extra_memory"].get(name)
            body.append(
                [
                    label,
                    f"limit: {name}" if kind == "limit" else name,
                    " / ".join(_milliseconds(m, name) for m in both),
                    " / ".join(_over_native(m, name) for m in both),
                    _rate(measured, name),
                    "100 %" if name == measured["limited_by"] else "" if share is None else f"{100 * share:.0f} %",
                    "" if memory is None else f"{memory / 2**20:.1f}",
                ]
            )
            label = ""
        body += [["", name, reason, *[""] * 4] for name, reason in measured["missing"].items()]
    return markdown_table(["op", "contender", "ms", "time / native", "rate", "of limit", "extra MiB"], body)


def memory_table(first: Run, _second: Run) -> str:
    """What was measured for its memory alone."""
    body = []
    for measured in first["measured"]:
        if not measured["spec"]["timed"]:
            found = measured["extra_memory"]
            body.append([measured["label"], *(f"{found[n] / 2**20:.0f}" if n in found else "" for n in MEMORY_OF)])
    return markdown_table(["op", *MEMORY_OF], body)


def h100_table(_first: Run, _second: Run) -> str:
    """Times at 85 % of the bandwidth, or 80 % of the bfloat16 rate, of an H100's data sheet."""
    replace, cuda = dataclasses.replace, specs.CUDA_TARGET_SPECS
    chosen = (
        specs.TOKEN_FP32,
        replace(specs.TOKEN_FP32, dtype="bfloat16"),
        *cuda[:2],
        specs.LINEAR_BF16,
        cuda[2],
        replace(cuda[2], entropy=True),
        specs.FOLD_FP32,
        replace(specs.FOLD_FP32, dtype="bfloat16"),
    )
    body = []
    for spec in chosen:
        if spec.op == specs.LINEAR:
            operations = 2 * (2 + spec.entropy) * spec.rows * spec.hidden * spec.vocabulary
            seconds, amount = operations / (0.80 * H100_BF16_PER_SECOND), f"{operations / 1e12:.3g} TFLOP"
        else:
            module = token_logprobs_problem if spec.op == specs.TOKEN else accumulate_problem
            moved = module.moved_bytes(spec)
            seconds, amount = moved / (0.85 * H100_BYTES_PER_SECOND), f"{moved / 1e9:.3g} GB"
        body.append([spec.label, amount, f"{1e3 * seconds:.3g}"])
    return markdown_table(["op", "on paper", "ms"], body)


def dispatch_table(first: Run, second: Run) -> str:
    """Both runs' costs of a call."""
    body = [
        [name, *(significant(1e6 * run["dispatch_seconds"][name]) for run in (first, second))]
        for name in first["dispatch_seconds"]
    ]
    return markdown_table([DISPATCH_HEADER[0], "µs, run 1", "µs, run 2"], body)


PARTS = {
    "machine": machine_text,
    "targets": targets_table,
    "everything": everything_table,
    "memory": memory_table,
    "h100": h100_table,
    "dispatch": dispatch_table,
}


def filled(text: str, first: Run, second: Run) -> str:
    """``text`` with every marked part made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"no {begin} ... {end} to fill")
        content = f"{begin}\n{make(first, second)}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: content, text, flags=re.DOTALL)  # noqa: B023
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.document", description=__doc__)
    parser.add_argument("runs", type=Path, nargs=2, metavar="DIR")
    folders = parser.parse_args().runs
    first, second = (json.loads((folder / "kernels_cpu.json").read_text()) for folder in folders)
    page = DOCS / "performance.md"
    page.write_text(filled(page.read_text(), first, second))
    shutil.copyfile(folders[0] / "kernels_cpu.png", DOCS / "roofline.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
