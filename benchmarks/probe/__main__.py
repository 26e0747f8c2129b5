"""Time the probe's engines against the training step they forecast, and against other ways to the same numbers.

    python -m benchmarks.probe                          # all workloads, two threads; leave the machine alone
    python -m benchmarks.probe --workloads short,long
    python -m benchmarks.probe --workloads none --growth --profile
    python -m benchmarks.probe --quick                  # tiny sizes, to see that everything runs

What is wrong gets no speed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.kernels.machine import description
from benchmarks.kernels.report import print_table
from benchmarks.probe import growth, growth_plot, report, targets
from benchmarks.probe.contenders import CONTENDERS
from benchmarks.probe.measure import Effort, Measured, measure
from benchmarks.probe.profile import measure_profile
from benchmarks.probe.workloads import PROFILED, QUICK, WORKLOADS, Workload
from entropy_fast.errors import EntropyFastWarning

RESULTS = Path(__file__).parents[1] / "results"
NAME = "probe_cpu"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(w.name for w in WORKLOADS)
    parser.add_argument("--workloads", help=f"some of {names}, with commas between; none for none (default: all)")
    parser.add_argument("--contenders", help=f"some of {', '.join(c.name for c in CONTENDERS)} (default: all)")
    parser.add_argument("--repeat", type=int, default=5, help="measured rounds, at least 5 for a result (default: 5)")
    parser.add_argument(
        "--slow-repeat", type=int, default=3, help="rounds of all but one_pass and plain_step (default: 3)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default: 2)")
    parser.add_argument(
        "--growth", action="store_true", help="how time grows with prompts, length, vocabulary and rank"
    )
    parser.add_argument("--profile", action="store_true", help="time of one call by stage, and its operations")
    parser.add_argument("--no-memory", action="store_true", help="without the processes that measure memory")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for JSON, Markdown, pictures and sampled text"
    )
    options = parser.parse_args(arguments)
    if options.repeat < 1 or options.slow_repeat < 1:
        parser.error("--repeat and --slow-repeat are numbers of rounds: at least 1")
    options.chosen = _chosen(parser, options.workloads, QUICK if options.quick else WORKLOADS)
    options.contenders = options.contenders and tuple(options.contenders.split(","))
    unknown = set(options.contenders or ()) - {c.name for c in CONTENDERS}
    if unknown:
        parser.error(f"--contenders: no such contender: {', '.join(sorted(unknown))}")
    return options


def _chosen(parser: argparse.ArgumentParser, names: str | None, there: tuple[Workload, ...]) -> list[Workload]:
    by_name = {w.name: w for w in there}
    if names is None:
        return list(there)
    asked = [] if names == "none" else names.split(",")
    unknown = [name for name in asked if name not in by_name]
    if unknown:
        parser.error(f"--workloads: no such workload: {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in asked]


def show(console: Console, measured: Measured) -> None:
    print_table(console, report.title(measured), report.header(measured), report.rows(measured))
    if measured.busy_elsewhere is not None:
        console.print(f"Other processes kept {measured.busy_elsewhere:.2f} cores busy meanwhile.", highlight=False)


def _rollouts_file(workload: Workload, folder: Path) -> Path | None:
    return None if workload.pretrained is None else folder / f"rollouts_{workload.name}.jsonl"


def run(options: argparse.Namespace, console: Console) -> report.Everything:
    """Measure what was asked for, table by table."""
    asked = ("workloads", "contenders", "repeat", "slow_repeat", "threads", "quick")
    found = report.Everything(description("cpu"), {key: getattr(options, key) for key in asked})
    console.print(f"{found.machine['cpu']}, {options.threads} threads, torch {torch.__version__}", highlight=False)
    effort = Effort(options.repeat, options.slow_repeat, not options.no_memory, options.contenders)
    for workload in options.chosen:
        measured = measure(workload, effort, _rollouts_file(workload, options.out))
        found.measured.append(measured)
        show(console, measured)
    if options.growth:
        axes = growth.QUICK_AXES if options.quick else growth.AXES
        found.grown = [growth.measure_growth(axis, options.repeat) for axis in axes]
        print_table(console, "Growth of one_pass", report.GROWTH_HEADER, report.growth_rows(found.grown))
    for workload in PROFILED if options.profile else ():
        small = options.quick
        profile = measure_profile(workload.small() if small else workload, options.repeat, 256 if small else 2048)
        found.profiles.append(profile)
        print_table(
            console, f"Stages of one_pass, {workload.name}", report.PROFILE_HEADER, report.profile_rows(profile)
        )
        print_table(console, "Necessary operations", report.OPERATIONS_HEADER, report.operations_rows(profile))
        console.print(report.profile_sentence(profile), highlight=False, soft_wrap=True)
    # Nothing about tiny sizes says whether a target is reached.
    if not options.quick:
        found.outcomes = targets.outcomes(found.measured) + growth.outcomes(found.grown)
    if found.outcomes:
        print_table(console, "Targets", report.TARGET_HEADER, report.target_rows(found.outcomes))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 when a result was wrong."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 180)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        found = run(options, console)
    text = report.as_json(found)
    written = [
        report.write(options.out, f"{NAME}.json", text),
        report.write(options.out, f"{NAME}.md", "\n\n".join(report.markdown(json.loads(text)).values()) + "\n"),
    ]
    written += growth_plot.draw(found.grown, options.out / "probe_growth.png")
    console.print("Written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)
    return 1 if any(m.wrong for m in found.measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
