"""What goes to which stream and how: JSON alone, colours where they belong, libraries quiet, statuses that mean something."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from rich.cells import cell_len
from small_policy import saved_run

import entropy_fast.api
from entropy_fast.cli.app import run
from entropy_fast.cli.exit_status import MEANINGS, ExitStatus
from entropy_fast.run_folder.result_files import read_result_document

SEQUENCE = re.compile(r"\x1b")
PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(stored, tmp_path, monkeypatch) -> Path:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return Path(shutil.copytree(stored, tmp_path / "run"))


def test_probe_prints_its_result_as_json_and_nothing_else(folder, monkeypatch, capsys):
    real = entropy_fast.api.fast_delta_h1

    def noisy(*arguments, **named):
        print("a library talks")
        return real(*arguments, **named)

    monkeypatch.setattr("entropy_fast.api.fast_delta_h1", noisy)
    stdout = sys.stdout
    assert run(["probe", str(folder), "--out", str(folder / "out"), "--json"]) == 0
    assert sys.stdout is stdout
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((folder / "out" / "result.json").read_text())
    assert json.loads(shown.out) == read_result_document(folder / "out")
    assert "a library talks" in shown.err


def test_validate_prints_its_validation_as_json_and_nothing_else(folder, capsys):
    command = ["validate", str(folder), "--etas", "1", "--out", str(folder / "out"), "--no-picture"]
    assert run([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((folder / "out" / "validation.json").read_text())
    assert [point["eta"] for point in document["runs"][str(folder)]["points"]] == [1]
    assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines[1:-2])) <= 80  # but for names of folders
    found = document["runs"][str(folder)]
    assert " ".join(lines[1:]).startswith(
        f"Both ways the change is {found['slope']:.4g} of the direct forecast on average"
    )
    row = next(line for line in lines if line.startswith("1 ")).split()
    point, (direct, *_) = found["points"][0], found["forecast"]
    ratio = point["symmetric"]["direct"] / direct
    assert row == ["1", f"{direct:+.4g}", f"{point['symmetric']['direct']:+.4g}", f"{ratio:.4f}"]


def test_doctor_as_json_and_on_one_screen(folder, capsys):
    assert run(["doctor", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "entropy_fast.doctor/1"
    assert document["verdict"]["passed"] is True
    assert {check["name"] for check in document["checks"]} >= {"torch", "grad context", "optimizer", "dropout off"}
    assert run(["doctor", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == document["verdict"]["detail"]
    assert len(lines) <= 32 and max(map(cell_len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    assert all(f"{check['name']}: " in said for check in document["checks"] if check["passed"] is True)
    saved = (folder / "rollouts.jsonl").read_text()
    (folder / "rollouts.jsonl").write_text(saved.replace('"temperature": 1.0', '"temperature": 0.5'))
    assert run(["doctor", str(folder), "--json"]) == ExitStatus.REFUSED
    assert json.loads(capsys.readouterr().out)["verdict"]["passed"] is False


def test_json_and_everything_cannot_both_be_had(folder, capsys):
    assert run(["probe", str(folder), "--json", "--verbose"]) == ExitStatus.USAGE
    shown = capsys.readouterr()
    assert shown.out == "" and "--verbose and --json" in shown.err


def test_what_is_refused_prints_no_json(folder, capsys):
    assert run(["probe", str(folder), "--rollouts", "missing.jsonl", "--json"]) == ExitStatus.REFUSED
    assert capsys.readouterr().out == ""


def test_a_result_that_cannot_be_written_is_printed_as_json_too(folder, monkeypatch, capsys):
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("entropy_fast.run_folder.result_files.pq.write_table", full)
    assert run(["probe", str(folder), "--out", str(folder / "out"), "--json"]) == ExitStatus.REFUSED
    assert json.loads(capsys.readouterr().out)["verdict"]["sentence"]


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": ""}, False),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"NO_COLOR": "", "FORCE_COLOR": "1"}, True),
    ],
    ids=str,
)
def test_colours_where_they_are_asked_for(folder, monkeypatch, capsys, environment, coloured):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(["doctor"]) == 0
    shown = capsys.readouterr()
    assert (SEQUENCE.search(shown.out) is not None) == coloured
    assert run(["probe", "--out", "o"]) == ExitStatus.USAGE
    assert (SEQUENCE.search(capsys.readouterr().err) is not None) == coloured


@pytest.mark.parametrize("arguments", [["--help"], ["probe", "--help"], ["probe", "--no-such-option"]])
def test_no_colours_in_help_that_is_piped(folder, capsys, arguments):
    run(arguments)
    shown = capsys.readouterr()
    assert not SEQUENCE.search(shown.out + shown.err)


def bars_of_libraries() -> list[str]:
    """What the bars of each library write."""
    import datasets.utils  # noqa: F401  # which makes its bar a class of its own
    import tqdm.auto
    from huggingface_hub.utils import tqdm as of_hub
    from transformers.utils import logging as of_transformers

    of_datasets = sys.modules["datasets.utils.tqdm"].tqdm
    written = []
    for bar in (tqdm.auto.tqdm, of_hub, of_datasets, of_transformers.tqdm):
        stream = io.StringIO()
        assert list(bar(range(3), file=stream, disable=False)) == [0, 1, 2]
        written.append(stream.getvalue())
    return written


def test_libraries_are_quiet_meanwhile_and_get_everything_back(folder, monkeypatch):
    from transformers.utils import logging as of_transformers

    def state() -> tuple[object, ...]:
        loggers = [logging.getLogger(name).level for name in ("transformers", "bitsandbytes")]
        return (*loggers, list(warnings.filters))

    real, seen = entropy_fast.api.fast_delta_h1, []

    def watched(*arguments, **named):
        seen.append((bars_of_libraries(), state()))
        return real(*arguments, **named)

    monkeypatch.setattr("entropy_fast.api.fast_delta_h1", watched)
    of_transformers.set_verbosity_info()
    try:
        before = state()
        assert all("3/3" in shown for shown in bars_of_libraries())
        assert run(["probe", str(folder), "--out", str(folder / "out"), "--no-picture"]) == 0
        [(bars, meanwhile)] = seen
        assert not any(bars) and meanwhile[:2] == (logging.ERROR, logging.ERROR)
        assert state() == before and all("3/3" in shown for shown in bars_of_libraries())
        monkeypatch.setattr("entropy_fast.api.fast_delta_h1", lambda *a, **k: 1 / 0)
        assert run(["probe", str(folder), "--out", str(folder / "out"), "--no-picture"]) == ExitStatus.FAULT
        assert state() == before and all("3/3" in shown for shown in bars_of_libraries())
    finally:
        of_transformers.set_verbosity_warning()


def test_a_fault_of_ours_is_told_from_what_is_refused(folder, monkeypatch, capsys):
    def broken(*arguments: object, **named: object) -> None:
        raise KeyError("no such thing \x1b[2J\u202e")

    monkeypatch.setattr("entropy_fast.api.fast_delta_h1", broken)
    assert run(["probe", str(folder), "--out", str(folder / "out")]) == ExitStatus.FAULT
    shown = capsys.readouterr()
    assert "Traceback" in shown.err and "unexpected KeyError" in " ".join(shown.err.split())
    assert "fault of entropy-fast" in " ".join(shown.err.split())
    assert "\x1b" not in shown.err and "\u202e" not in shown.err
    assert shown.out == ""


def test_a_traceback_of_what_is_refused_is_there_for_the_asking(folder, monkeypatch, capsys):
    command = ["probe", str(folder), "--rollouts", "missing.jsonl"]
    assert run(command) == ExitStatus.REFUSED
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("ENTROPY_FAST_TRACEBACK", "1")
    assert run(command) == ExitStatus.REFUSED
    assert "Traceback" in capsys.readouterr().err


def test_every_status_is_in_the_help_and_in_the_docs(capsys):
    assert run(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    rows = dict(re.findall(r"^\| (\d) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(MEANINGS) == set(ExitStatus)
    for status, meaning in MEANINGS.items():
        assert f"{status.value} {meaning}" in said
        assert rows[str(status.value)] == meaning


def test_where_the_files_are_is_never_broken(folder, capsys):
    out = folder / ("long" * 20) / "out"
    assert run(["probe", str(folder), "--out", str(out), "--no-picture"]) == 0
    *_, files, folder_line = capsys.readouterr().out.splitlines()
    assert files.startswith("written: result.json, per_prompt.parquet") and folder_line == f"to {out}"
