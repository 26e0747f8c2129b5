"""What the forecast costs a trainer that has its gradient already: cost and error by how many prompts are sampled.

    python -m benchmarks.probe.live            # SmolLM2-135M with LoRA, 64 prompts x 8 responses; sampling them takes minutes
    python -m benchmarks.probe.live --quick    # tiny sizes, to see that everything runs

The step's own forward and backward leave their gradient in ``.grad``; the direct part of the entropy change along the whole
next step is then forecast from a sample of the prompts. Times are in units of that forward and backward, taken in turns with
it. Before a speed is printed, the forecast from all prompts is held against the one whose gradient comes from the rollouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels.machine import description
from benchmarks.kernels.report import print_table
from benchmarks.kernels.timing import interleaved
from benchmarks.probe import report
from benchmarks.probe.plain_step import plain_step
from benchmarks.probe.setting import Setting, build
from benchmarks.probe.workloads import SHORT, SMOL, Workload, small_like
from entropy_fast import DeltaH1Result, EstimateOptions, RunOptions, fast_delta_h1
from entropy_fast.errors import EntropyFastWarning

ALLOWED, ALLOWED_IN_16_BITS = 1e-3, 0.05  # of the direct part, between the two sources of the same gradient
AIMED = 0.1
HEADER = ["prompts sampled", "seconds", "of a plain step", "direct part", "its error", "relative error"]


def forecast(setting: Setting, **options: Any) -> DeltaH1Result:
    """The direct part along the next step."""
    return fast_delta_h1(
        setting.model,
        setting.optimizer,
        setting.update,
        estimate=EstimateOptions(parts=("direct",), step="next", **options),
        run=RunOptions(autocast_dtype=setting.autocast_dtype),
    )


def leave_gradient(setting: Setting) -> None:
    """What a trainer has just before it steps: of the mean over prompts."""
    plain_step(setting.model, setting.padded, setting.autocast())
    for parameter in setting.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= setting.update.n_prompts


def complaint(setting: Setting, live: DeltaH1Result) -> str | None:
    """Why the forecast from the live gradient of all prompts is wrong; None where it is not."""
    expected = forecast(setting)
    assert live.split is not None and expected.split is not None
    off = abs(live.split.direct.value / expected.split.direct.value - 1)
    allowed = ALLOWED_IN_16_BITS if setting.workload.bfloat16 else ALLOWED
    if not off <= allowed:
        return f"WRONG: {live.split.direct.value:.6g} from .grad, {expected.split.direct.value:.6g} from the rollouts"
    return None


def measure(workload: Workload, sizes: Sequence[int], rounds: int, file: Path) -> dict[str, Any]:
    """Seconds and forecasts by sample size, and of the plain step."""
    setting = build(workload, file)
    leave_gradient(setting)
    wrong = complaint(setting, forecast(setting, gradient="live"))
    if wrong is not None:
        return {"workload": workload.label, "wrong": wrong}
    gradients = [p.grad for p in setting.model.parameters()]

    def step() -> None:
        leave_gradient(setting)
        for parameter, kept in zip(setting.model.parameters(), gradients, strict=True):
            parameter.grad = kept

    calls: dict[str, Any] = {"plain step": step}
    options = {str(size): {"sample": size} for size in sizes} | {f"until {AIMED:.0%}": {"relative_error": AIMED}}
    for name, own in options.items():
        calls[name] = lambda own=own: forecast(setting, gradient="live", **own)
    times = interleaved(calls, "cpu", rounds, warm_up=0)  # what came before has warmed all of it up
    rows = []
    for name, own in options.items():
        found = forecast(setting, gradient="live", **own)
        assert found.split is not None
        ratio = statistics.median(a / b for a, b in zip(times[name], times["plain step"], strict=True))
        direct = found.split.direct
        rows.append(
            {
                "prompts": f"{len(found.per_prompt)}" + ("" if name.isdigit() else f" ({name})"),
                "seconds": statistics.median(times[name]),
                "of_plain_step": ratio,
                "value": direct.value,
                "std_error": direct.std_error,
                "relative": direct.std_error / abs(direct.value),
            }
        )
    plain = statistics.median(times["plain step"])
    return {
        "workload": workload.label,
        "rows": rows,
        "plain_step": plain,
        "of": setting.update.n_prompts,
        "wrong": None,
    }


def table(found: dict[str, Any]) -> list[list[str]]:
    """As it is printed."""
    return [
        [
            row["prompts"],
            f"{row['seconds']:.2f}",
            f"{row['of_plain_step']:.3f}",
            f"{row['value']:+.4g}",
            f"{row['std_error']:.2g}",
            "unknown" if math.isnan(row["relative"]) else f"{row['relative']:.1%}",
        ]
        for row in found["rows"]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 when a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe.live",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--sizes", default="2,4,8,16,32,64", help="of samples, with commas between")
    parser.add_argument("--repeat", type=int, default=3, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder for JSON and text"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    # In float32: its errors are those of sampling.
    workload = dataclasses.replace(SMOL, prompts=options.prompts, bfloat16=False, name=f"smollm2-{options.prompts}")
    sizes = [int(size) for size in options.sizes.split(",")]
    if options.quick:
        workload, sizes = dataclasses.replace(small_like(SHORT), prompts=6), [2, 3, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)
        found = measure(
            workload, sizes, 1 if options.quick else options.repeat, options.out / f"{workload.name}_rollouts.jsonl"
        )
    if found["wrong"]:
        console.print(found["wrong"])
        return 1
    print_table(console, f"{found['workload']}; plain step {found['plain_step']:.1f} s", HEADER, table(found))
    text = json.dumps({"machine": description("cpu"), **found}, indent=1)
    console.print(f"Written: {report.write(options.out, 'probe_live.json', text)}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
