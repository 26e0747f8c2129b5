"""The tests marked gpu, each file's in a row that follows them as they pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu.process import run_as_stage
from benchmarks.gpu.rows import OK, SKIPPED, WRONG, RowWriter, Status
from benchmarks.gpu.stages import ROOT, Options

MARK = "mark.gpu"
FAILURES_SHOWN = 20


def marked_files(folder: Path) -> list[Path]:
    """Files with a test that is marked. The others need not be importable on such a machine."""
    return sorted(path for path in folder.rglob("test_*.py") if MARK in path.read_text(encoding="utf-8"))


class Recorder:
    """A pytest plugin that writes a row for every file, again after each test, and one for every failure."""

    def __init__(self, rows: RowWriter) -> None:
        self._rows = rows
        self._counts: dict[str, Counter[str]] = {}
        self._reasons: dict[str, str] = {}
        self._left: Counter[str] = Counter()
        self._failures = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._left = Counter(item.nodeid.partition("::")[0] for item in session.items)
        self._rows.plan(list(self._left))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failure(f"{report.nodeid} (collection)", report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        counts = self._counts.setdefault(file, Counter())
        if report.when == "call" or report.outcome != "passed":
            counts[report.outcome] += 1
            if report.failed:
                self._failure(report.nodeid, report.longreprtext)
            if report.skipped and isinstance(report.longrepr, tuple):
                self._reasons[file] = report.longrepr[2]
        if report.when == "teardown":
            self._left[file] -= 1
            self._write(file)

    def _write(self, file: str) -> None:
        counts = self._counts[file]
        status: Status = WRONG if counts["failed"] else OK if counts["passed"] else SKIPPED
        why = self._reasons.get(file, "")
        if self._left[file]:
            # It is settled as out of time, or as where the process crashed, unless a later row takes its place.
            status, why = ("wrong" if counts["failed"] else "running"), ""
        values = {name: counts[name] for name in ("passed", "failed", "skipped")}
        self._rows.write(file, status, why, {**values, "left": self._left[file]})

    def _failure(self, name: str, text: str) -> None:
        self._failures += 1
        if self._failures <= FAILURES_SHOWN:
            last = [line for line in text.splitlines() if line.strip()][-3:]
            self._rows.write(name, WRONG, " / ".join(last)[:600])


def run(options: Options, rows: RowWriter) -> int:
    """Run them. Their failures are rows; another status of pytest's is this process's."""
    files = marked_files(ROOT / "tests")
    # The markers and the mode are those of pyproject.toml; --strict-config would ask for plugins that need not be here.
    addopts = "--import-mode=importlib --strict-markers"
    arguments = ["-m", "gpu", "-q", "-o", f"addopts={addopts}", "--rootdir", str(ROOT), *map(str, files)]
    status = pytest.main(arguments, plugins=[Recorder(rows)])
    return 0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else int(status)


if __name__ == "__main__":
    run_as_stage(run)
