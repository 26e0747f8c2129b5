"""``entropy-fast report``, and what a probe writes for it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_policy import saved_run

from entropy_fast import read_rollouts
from entropy_fast.cli.app import run
from entropy_fast.cli.exit_status import ExitStatus
from entropy_fast.run_folder.result_reading import read_result
from entropy_fast.truth import EntropyLedger


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = saved_run(tmp_path_factory.mktemp("run"))
    assert (
        run(["probe", str(folder), "--step", "next", "--by-token", "--no-picture", "--candidate", "entropy_bonus=0.1"])
        == 0
    )
    return folder


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def test_a_probe_leaves_its_responses_and_how_to_repeat_it(stored):
    found = read_result(stored)
    [command] = found.provenance.commands
    words = ["entropy-fast", "probe", str(stored), "--candidate", "entropy_bonus=0.1", "--no-picture"]
    assert shlex.split(command) == [*words, "--step", "next", "--by-token"]
    assert found.provenance.files["rollouts"] == str(stored / "rollouts.jsonl")
    assert found.provenance.model == str(stored / "base")
    rollouts = read_rollouts(stored / "rollouts.jsonl")
    scored = [ids[mask == 1].tolist() for ids, mask in zip(rollouts.input_ids, rollouts.loss_mask, strict=True)]
    assert [list(r.token_ids) for r in found.responses] == scored
    assert all(r.tokens is not None and r.shares is not None for r in found.responses)


def test_the_command_gives_the_result_again(stored, tmp_path):
    [command] = read_result(stored).provenance.commands
    assert run([*shlex.split(command)[1:], "--out", str(tmp_path)]) == 0
    first, second = (json.loads((path / "result.json").read_text()) for path in (stored, tmp_path))
    assert second["delta_h1"] == first["delta_h1"]
    assert set(second["updates"]) == {"entropy_bonus=0.1"}
    table, again = (pq.read_table(path / "responses.parquet") for path in (stored, tmp_path))
    assert again.equals(table)


def test_without_a_tokenizer_that_is_said(folder, capsys):
    for path in (folder / "base").glob("*token*"):
        path.unlink()
    assert (
        run(["probe", str(folder), "--no-picture", "--model", str(folder / "base"), "--out", str(folder / "out")]) == 0
    )
    assert "tokens are written without their texts: tokenizer of" in " ".join(capsys.readouterr().out.split())
    found = read_result(folder / "out")
    assert all(r.tokens is None and r.token_ids for r in found.responses)


def test_a_report_of_a_run(folder, capsys):
    assert run(["report", str(folder)]) == 0
    assert f"written: {folder / 'report.html'}" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert read_result(folder).result.verdict.sentence.replace(" %", "\u00a0%") in page
    assert "0 plus 1 is" in page


def test_a_report_of_several_runs_and_a_ledger(folder, tmp_path, capsys):
    ledger = EntropyLedger(tmp_path / "ledger.parquet")
    for step in range(4):
        ledger.record(step, part="direct", forecast=-0.1 * step, std_error=0.01, realised=-0.11 * step)
    out = tmp_path / "page.html"
    assert run(["report", str(folder), str(tmp_path / "ledger.parquet"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count('<article class="run"') == 2
    assert "Too few to judge: 4 of at least 8" in page
    assert run(["report", str(tmp_path / "ledger.parquet")]) == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("path", "message"),
    [("none", "does not exist"), ("run/adapter", "there is nothing to report"), ("", "the path is empty")],
)
def test_what_there_is_nothing_of_is_said(folder, monkeypatch, capsys, path, message):
    monkeypatch.chdir(folder.parent)
    assert run(["report", path]) == (ExitStatus.REFUSED if path else ExitStatus.USAGE)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_page_that_cannot_be_written_is_said(folder, capsys):
    assert run(["report", str(folder), "--out", str(folder / "no" / "page.html")]) == ExitStatus.REFUSED
    assert "does not exist" in " ".join(capsys.readouterr().err.split())
