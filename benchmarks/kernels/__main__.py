"""Time every op against its rivals and against this machine's limits.

    python -m benchmarks.kernels                 # CPU, two threads, some minutes
    python -m benchmarks.kernels --targets-only  # the numbers with a target alone
    python -m benchmarks.kernels --device cuda

Everything runs in one process, in turns. What is wrong gets no speed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.kernels import dispatch, report, roofline, specs
from benchmarks.kernels.copy_limit import BYTES, QUICK_BYTES, Copy
from benchmarks.kernels.machine import description
from benchmarks.kernels.measure import Measured, measure_spec
from benchmarks.kernels.targets import outcomes

RESULTS = Path(__file__).parents[1] / "results"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, at least 7 for a result (default: 9)")
    parser.add_argument("--op", choices=(specs.TOKEN, specs.LINEAR, specs.FOLD), help="this op alone")
    parser.add_argument("--targets-only", action="store_true", help="only what has a target")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; no compilation")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    parser.add_argument("--no-memory", action="store_true", help="without the processes that measure memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, Markdown and the roofline picture")
    return parser.parse_args(arguments)


def chosen_specs(options: argparse.Namespace) -> list[specs.Spec]:
    cuda = options.device == "cuda"
    if options.quick:
        chosen = specs.QUICK_SPECS
    else:
        chosen = specs.CUDA_TARGET_SPECS if cuda else specs.TARGET_SPECS
        if not options.targets_only:
            chosen += specs.CUDA_MORE_SPECS if cuda else specs.MORE_SPECS
    return [spec for spec in chosen if options.op in (None, spec.op)]


def show(console: Console, measured: Measured) -> None:
    report.print_table(console, measured.spec.label, report.header(measured.backends()), report.rows(measured))
    if measured.busy_elsewhere is not None:
        console.print(f"Other processes kept {measured.busy_elsewhere:.2f} cores busy meanwhile.", highlight=False)
    for name, complaint in measured.wrong.items():
        console.print(f"WRONG: {name} of {measured.spec.label}: {complaint}", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 when a result was wrong, 2 when there is no such device."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: torch.cuda.is_available() is False. Nothing was measured.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    # Compiling one function for several shapes is what is wanted here.
    torch._dynamo.config.recompile_limit = 64
    console = Console(width=None if sys.stdout.isatty() else 180)
    machine = description(options.device)
    console.print(f"{machine['cpu']}, {options.threads} threads, torch {machine['torch']}", highlight=False)
    compiles = not (options.no_compile or options.quick)
    copy = Copy(options.device, QUICK_BYTES if options.quick else BYTES)
    measured = []
    for spec in chosen_specs(options):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
            found = measure_spec(
                spec, options.device, options.rounds, copy, compiles=compiles, with_memory=not options.no_memory
            )
        measured.append(found)
        show(console, found)
    costs = {} if options.op else dispatch.costs(repeats=20 if options.quick else 300)
    if costs:
        report.print_table(console, "Cost of a call", report.DISPATCH_HEADER, report.dispatch_rows(costs))
    verdicts = outcomes(measured, options.device)
    if verdicts:
        report.print_table(console, "Targets", report.TARGET_HEADER, report.target_rows(verdicts))
    name = f"kernels_{options.device}"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    written = [
        report.write(options.out, f"{name}.json", report.as_json(machine, settings, measured, verdicts, costs)),
        report.write(options.out, f"{name}.md", report.markdown(machine, measured, verdicts, costs)),
    ]
    written += roofline.draw(measured, options.out / f"{name}.png")
    console.print("Written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)
    return 1 if any(m.wrong for m in measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
