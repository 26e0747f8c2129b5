"""Build with CUDA, test, check and measure on a machine with a GPU, in a given time and without a download.

    python benchmarks/gpu_check.py --minutes 10
    python benchmarks/gpu_check.py --device cpu --minutes 2    # tiny sizes, to see that everything runs

The parts run in the order of their worth, each in a process of its own and with a share of the time that is left, so that
one that hangs or crashes costs no more than its share. The report is written again after each.

Exit status: 0 when nothing is wrong and all that could run did; 1 when something is wrong; 2 when there is no such device;
3 when nothing is wrong as far as it went, but time ran out.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.gpu import report, rows
from benchmarks.gpu.runner import Files, Outcome, Stop, run_stages
from benchmarks.gpu.stages import NO_CUDA_DEVICE, ROOT, STAGES, Options

RESULTS = ROOT / "benchmarks" / "results"
MARGIN = 2.0  # seconds, for what is written at the end


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together (default: 10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "micro"), help="default: full on cuda, micro on cpu")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", help=f"some of {', '.join(names)}, with commas between (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report, its rows and the log")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error("--minutes is more than 0")
    options.size = options.size or ("full" if options.device == "cuda" else "micro")
    chosen = names if options.stages is None else options.stages.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--stages: no such stage: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options.chosen = [stage for stage in STAGES if stage.name in chosen]
    return options


def exit_status(outcomes: list[Outcome]) -> int:
    statuses = {outcome.status for outcome in outcomes}
    if any(outcome.exit_status == NO_CUDA_DEVICE for outcome in outcomes):
        return 2
    return 1 if rows.WRONG in statuses else 3 if rows.OUT_OF_TIME in statuses else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    start = time.monotonic()
    options = parse(arguments)
    files = Files(options.out.resolve())
    files.clear()
    settings: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": options.device,
        "size": options.size,
        "minutes": options.minutes,
    }

    def write(outcomes: list[Outcome]) -> None:
        last = outcomes[-1]
        print(f"{last.stage.name}: {last.status} ({last.seconds:.0f} s) {last.why}".rstrip(), flush=True)
        report.write(settings, outcomes, files)

    stop = Stop()

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        stop.reason = f"the run was stopped by {signal.Signals(number).name}"

    # One that is ignored, as under nohup, stays so.
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handled = [number for number in asked if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask_to_stop) for number in handled}
    try:
        deadline = start + 60 * options.minutes - MARGIN
        outcomes = run_stages(options.chosen, Options(options.device, options.size), files, deadline, write, stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"Written: {files.markdown}, {files.json}", flush=True)
    status = exit_status(outcomes)
    if status == 2:
        print("No CUDA device: torch.cuda.is_available() is False. Nothing was measured.", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
