"""What happens around a command: quick help, streams that fail, signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_policy import saved_run

import entropy_fast
from entropy_fast.cli import app
from entropy_fast.cli.app import run
from entropy_fast.cli.console import lenient_streams
from entropy_fast.errors import ResultError
from entropy_fast.run_folder.result_files import read_result_document


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


QUICK = """
import contextlib, io, os, sys
from entropy_fast.cli.app import run
shown = []
for arguments in (["--version"], ["--help"], *([name, "--help"] for name in ("demo", "probe", "sample", "doctor", "validate"))):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert run(arguments) == 0, arguments
    assert text.getvalue().strip(), arguments
os.environ |= {"_ENTROPY_FAST_COMPLETE": "complete_bash", "COMP_WORDS": "entropy-fast probe --weig", "COMP_CWORD": "2"}
os.environ |= {"_TYPER_COMPLETE_ARGS": "entropy-fast probe --weig"}
with contextlib.redirect_stdout(io.StringIO()) as text:
    run([])
assert "--weighting" in text.getvalue(), text.getvalue()
heavy = {"torch", "transformers", "peft", "numpy", "scipy", "pyarrow", "matplotlib", "bitsandbytes"} & set(sys.modules)
assert not heavy, heavy
import entropy_fast
assert dir(entropy_fast) == sorted(entropy_fast.__all__)
assert {"fast_delta_h1", "Rollouts", "AdamState", "EstimateOptions", "RunOptions", "errors", "ops"} <= set(dir(entropy_fast))
assert "torch" not in sys.modules
assert entropy_fast.errors.ConfigError.__module__ == "entropy_fast.errors"
for name in dir(entropy_fast):
    getattr(entropy_fast, name)
assert entropy_fast.AdamState.__name__ == "AdamState" and entropy_fast.ops.token_logprobs
"""


def test_help_version_completion_and_dir_import_nothing_heavy():
    found = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


class Full(io.StringIO):
    """A stream on a full disk, or whose reader has gone."""

    def __init__(self, error: type[OSError] = OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error(28, "No space left on device")


@pytest.mark.parametrize(("error", "status"), [(OSError, 4), (BrokenPipeError, 0)])
def test_a_result_is_written_though_it_cannot_be_printed(folder, tmp_path, monkeypatch, capsys, error, status):
    monkeypatch.setattr(sys, "stdout", Full(error))
    assert run(["probe", str(folder), "--out", str(tmp_path / "out"), "--no-picture"]) == status
    assert read_result_document(tmp_path / "out")["delta_h1"] != 0
    said = "standard output cannot be written: No space left on device" in capsys.readouterr().err
    assert said == (status == 4)


def test_files_are_there_before_anything_is_printed(folder, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("entropy_fast.cli.saving.print_result", interrupted)
    assert run(["probe", str(folder), "--out", str(tmp_path / "out"), "--no-picture"]) != 0
    assert read_result_document(tmp_path / "out")["delta_h1"] != 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_cannot_be_encoded_is_replaced(folder, tmp_path, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(["probe", str(folder), "--out", str(tmp_path / "out"), "--no-picture", "--verbose"]) == 0
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert f"{read_result_document(tmp_path / 'out')['delta_h1']:.17g}" in shown
    assert "?H" in shown  # δH₁, of the tables
    screen = shown.partition("First-order")[0]
    assert "|--" in screen and "+-" in screen and "┤" not in screen


def test_a_progress_bar_that_cannot_be_shown_costs_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    assert run(["probe", str(folder), "--out", str(tmp_path / "out"), "--no-picture"]) == 0
    assert read_result_document(tmp_path / "out")["delta_h1"] != 0


def test_a_closed_standard_output_is_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with lenient_streams() as failure:
        print("nowhere")
        assert failure() is None
    assert sys.stdout is None


REAL = """
import sys
from entropy_fast.cli.app import run
sys.exit(run(["doctor"]))
"""


def test_real_pipes_and_full_devices_end_without_a_traceback(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is buffered is written again when Python ends
    command = f"{sys.executable} -c '{REAL}'"
    for redirected, status in (("| head -1 > /dev/null; exit ${PIPESTATUS[0]}", 0), ("> /dev/full", 4), (">&-", 0)):
        found = subprocess.run(["bash", "-c", f"{command} {redirected}"], capture_output=True, text=True, check=False)
        assert found.returncode == status, (redirected, found.stderr)
        assert "Traceback" not in found.stderr
        assert "Exception ignored" not in found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("during", ["work", "drawing", "writing"])
def test_a_signal_leaves_nothing(folder, tmp_path, monkeypatch, number, during):
    out = tmp_path / "new" / "out"

    def end(*arguments: object, **named: object) -> None:
        os.kill(os.getpid(), number)
        while True:  # until Python comes to run the handler
            pass

    target = {
        "work": "entropy_fast.api.fast_delta_h1",
        "drawing": "entropy_fast.report.plots.overview.contributions",
        "writing": "entropy_fast.run_folder.result_files.pq.write_table",
    }[during]
    monkeypatch.setattr(target, end)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # under nohup a hang-up is ignored
    try:
        assert run(["probe", str(folder), "--out", str(out)]) == 128 + number
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(app, "_status", lambda arguments: signal.raise_signal(signal.SIGHUP) or 0)
        assert run([]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_number_that_is_not_finite_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch, capsys):
    import dataclasses

    import entropy_fast.api

    real = entropy_fast.api.fast_delta_h1
    monkeypatch.setattr(
        "entropy_fast.api.fast_delta_h1", lambda *a, **k: dataclasses.replace(real(*a, **k), x_dot_y=float("nan"))
    )
    assert run(["probe", str(folder), "--out", str(tmp_path / "out")]) == 3
    assert "`x_dot_y` is nan" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_written_is_shown(folder, tmp_path, monkeypatch, capsys):
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("entropy_fast.run_folder.result_files.pq.write_table", full)
    assert run(["probe", str(folder), "--out", str(tmp_path / "out"), "--no-picture"]) == 3
    shown = capsys.readouterr()
    assert "Prompts that matter most" in shown.out
    assert "No space left on device" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_drawn_is_said_and_the_result_is_there(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("entropy_fast.report.plots.overview.contributions", lambda result: 1 / 0)
    assert run(["probe", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "contributions.png was not drawn: contributions.png cannot be drawn: ZeroDivision" in capsys.readouterr().out
    assert set(read_result_document(tmp_path / "out")["files"]) == {"per_prompt.parquet", "responses.parquet"}
    with pytest.raises(ResultError):
        read_result_document(tmp_path)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["delta_h1"]


def test_the_package_runs_as_a_module():
    found = subprocess.run(
        [sys.executable, "-m", "entropy_fast", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == entropy_fast.__version__
