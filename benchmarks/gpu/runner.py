"""One stage after another, each in a process of its own that is ended when its time is over."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu import rows
from benchmarks.gpu.stages import ENVIRONMENT, NO_CUDA_DEVICE, ROOT, Options, Stage

LEAST_SECONDS = 1.0  # with less than that left, nothing is started
POLL_SECONDS = 0.2
LOG_LINES = 12  # of a stage that crashed, in the report


@dataclasses.dataclass
class Stop:
    """Whether something asked this process to end.

    Attributes:
        reason: who; empty while nobody has.
    """

    reason: str = ""


@dataclasses.dataclass
class Outcome:
    """How a stage went.

    Attributes:
        stage: which.
        status: the worst of its rows, or what ended it.
        why: the reason, unless all is well.
        seconds: how long it ran.
        limit: how long it was allowed to; None where it was not started.
        exit_status: of its process; None where it was not started or was ended.
    """

    stage: Stage
    status: rows.Status
    why: str = ""
    seconds: float = 0.0
    limit: float | None = None
    exit_status: int | None = None


@contextlib.contextmanager
def source_tree_environment() -> Iterator[dict[str, str]]:
    """Environment variables under which this source tree can be imported without being installed, and nothing is downloaded.

    entropy_fast.kernels lives in kernels/triton; entropy_fast looks for its parts in every folder of its name on the path.
    """
    with tempfile.TemporaryDirectory(prefix="entropy_fast_gpu_check_") as folder:
        part = Path(folder) / "entropy_fast"
        part.mkdir()
        (part / "kernels").symlink_to(ROOT / "kernels" / "triton", target_is_directory=True)
        path = [str(ROOT), folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        yield os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            # Freed blocks go back to the system at once, so that a peak on the CPU is of what is in use.
            "MALLOC_MMAP_THRESHOLD_": str(2**18),
        }


def _run(
    stage: Stage, options: Options, files: Files, seconds: float, environment: dict[str, str], stop: Stop
) -> tuple[int | None, float]:
    """Exit status, None if it was ended; and the seconds it took."""
    request = json.dumps({**dataclasses.asdict(options), "stage": stage.name, "rows": str(files.rows.resolve())})
    start = time.monotonic()
    with files.log.open("a", encoding="utf-8") as log:
        log.write(f"=== {stage.name}\n")
        log.flush()
        process = subprocess.Popen(
            [*stage.command, request],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        status: int | None = None
        try:
            while status is None and not stop.reason and time.monotonic() < start + seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(POLL_SECONDS, seconds))
        finally:
            # Compilers and measuring processes that it started are in its group. Rows are in their file already.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return status, time.monotonic() - start


@dataclasses.dataclass(frozen=True)
class Files:
    """Where everything goes.

    Attributes:
        folder: of the files.
    """

    folder: Path

    @property
    def rows(self) -> Path:
        return self.folder / "gpu_check.rows.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "gpu_check.log"

    @property
    def json(self) -> Path:
        return self.folder / "gpu_check.json"

    @property
    def markdown(self) -> Path:
        return self.folder / "gpu_check.md"

    def clear(self) -> None:
        """A new run starts with none of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.rows, self.log, self.json, self.markdown):
            path.unlink(missing_ok=True)

    def log_tail(self, stage: Stage) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").rpartition(f"=== {stage.name}\n")[2]
        return "\n".join(text.splitlines()[-LOG_LINES:])


def settled(outcome: Outcome, found: list[rows.Row]) -> list[rows.Row]:
    """A stage's rows once it has ended: those that were not finished have met its end."""
    done = []
    for row in found:
        if row.status in (rows.RUNNING, rows.PLANNED):
            running = row.status == rows.RUNNING
            if outcome.status == rows.OUT_OF_TIME:
                status: rows.Status = rows.OUT_OF_TIME
                why = f"{'was running' if running else 'was next'} when the stage was ended ({outcome.why})"
            elif running:
                status, why = rows.WRONG, f"was running when the stage's process ended by itself ({outcome.why})"
            else:
                status, why = rows.SKIPPED, f"the stage's process ended before ({outcome.why or 'by itself'})"
            row = dataclasses.replace(row, status=status, why=why)
        done.append(row)
    return done


def _run_stage(
    stage: Stage, options: Options, files: Files, left: float, environment: dict[str, str], stop: Stop
) -> Outcome:
    if stop.reason:
        return Outcome(stage, rows.OUT_OF_TIME, stop.reason)
    if left < LEAST_SECONDS:
        return Outcome(stage, rows.OUT_OF_TIME, "no time was left to start it")
    limit = max(LEAST_SECONDS, stage.share * left)
    outcome = Outcome(stage, rows.OK, limit=limit)
    outcome.exit_status, outcome.seconds = _run(stage, options, files, limit, environment, stop)
    if outcome.exit_status is None:
        outcome.status, outcome.why = rows.OUT_OF_TIME, stop.reason or f"it had {limit:.0f} s"
        return outcome
    found = [row for row in rows.read(files.rows) if row.stage == stage.name]
    if outcome.exit_status not in (0, NO_CUDA_DEVICE):
        outcome.status = rows.WRONG
        outcome.why = f"exit status {outcome.exit_status}; the log ends with: {files.log_tail(stage)}"
    elif not found:
        outcome.status, outcome.why = rows.WRONG, "it wrote no rows"
    else:
        statuses = {row.status for row in settled(outcome, found)}
        outcome.status = next(s for s in (rows.WRONG, rows.OUT_OF_TIME, rows.OK, rows.SKIPPED) if s in statuses)
    return outcome


def run_stages(
    stages: Sequence[Stage],
    options: Options,
    files: Files,
    deadline: float,
    report: Callable[[list[Outcome]], None],
    stop: Stop,
) -> list[Outcome]:
    """Run all that there is time for. ``report`` is called after each, with an outcome for every stage so far.

    Args:
        stages: in the order of their worth.
        options: for all of them.
        files: of the run.
        deadline: of ``time.monotonic()``.
        report: what writes the report.
        stop: set from outside, it ends the stage that runs and all after it.

    Returns:
        One outcome a stage, also when the run was stopped.
    """
    outcomes: list[Outcome] = []
    no_device = False
    with source_tree_environment() as environment:
        for stage in stages:
            if options.device == "cpu" and stage.skipped_on_cpu:
                outcome = Outcome(stage, rows.SKIPPED, stage.skipped_on_cpu)
            elif no_device:
                outcome = Outcome(stage, rows.SKIPPED, "torch sees no CUDA device")
            else:
                outcome = _run_stage(stage, options, files, deadline - time.monotonic(), environment, stop)
                no_device = outcome.exit_status == NO_CUDA_DEVICE and stage.name == ENVIRONMENT
            outcomes.append(outcome)
            report(outcomes)
    return outcomes
