"""``probe --checkpoint``: a command that was ended goes on when it is typed again."""

from __future__ import annotations

import json
from pathlib import Path

import launched_probe
import pytest
from process_groups import torchrun
from small_policy import saved_run

from entropy_fast.cli.app import run
from entropy_fast.cli.bars import Bars
from entropy_fast.errors import OutputFileError
from entropy_fast.run_folder.manifest import read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"))


def command(folder, out, *more):
    short = ["--no-picture", "--prompts-per-microbatch", "1", "--memory-budget", "0"]
    return ["probe", str(folder), "--out", str(out), *short, *map(str, more)]


def numbers(out):
    found = json.loads((out / "result.json").read_text())
    return {name: found[name] for name in ("delta_h1", "std_error", "split", "functionals", "row_sums", "plan")}


def interrupted_at(patch, at):
    seen = []

    def report(self, stage, done, total):
        seen.append(done)
        if len(seen) == at:
            raise KeyboardInterrupt

    patch.setattr(Bars, "report", report)
    return seen


def test_typed_again_it_goes_on(folder, tmp_path, capsys, monkeypatch):
    assert run(command(folder, tmp_path / "plain")) == 0
    with monkeypatch.context() as patch:
        interrupted_at(patch, 6)
        assert run(command(folder, tmp_path / "out", "--checkpoint", tmp_path / "kept")) == 130
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "kept" / "rank-0-of-1" / "checkpoint.json").exists()
    # A result that cannot be written: what led to it stays.
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OutputFileError("no space", fix="make some")

        patch.setattr("entropy_fast.cli.saving.write_result", full)
        assert run(command(folder, tmp_path / "out", "--checkpoint", tmp_path / "kept")) == 3
    capsys.readouterr()
    with monkeypatch.context() as patch:
        seen = interrupted_at(patch, 0)
        assert run(command(folder, tmp_path / "out", "--checkpoint", tmp_path / "kept", "-v")) == 0
    assert seen == [4, 4, 4]  # all of three sweeps
    assert "went on from the checkpoint of" in " ".join(capsys.readouterr().out.split())
    assert numbers(tmp_path / "out") == numbers(tmp_path / "plain")
    assert not (tmp_path / "kept").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("phase", ["gradient sums", "result"])
def test_under_torchrun(folder, tmp_path, phase):
    """A rank is killed where sums are added up, or at the end; started again, all ranks go on, and one of them writes."""
    script, kept = Path(launched_probe.__file__), tmp_path / "kept"
    given = command(folder, tmp_path / "out", "--checkpoint", kept, "--rank-timeout", 60)
    assert torchrun(2, script, 1, phase, *given).returncode != 0
    assert not (tmp_path / "out").exists()
    assert sorted(path.parent.name for path in kept.glob("*/checkpoint.json")) == ["rank-0-of-2", "rank-1-of-2"]
    done = torchrun(2, "-m", "entropy_fast", *given, "-v")
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stdout.split()).count("went on from the checkpoint of") == 1
    assert not kept.exists()
    assert torchrun(2, "-m", "entropy_fast", *command(folder, tmp_path / "plain")).returncode == 0
    assert numbers(tmp_path / "out") == numbers(tmp_path / "plain")


def test_another_probe_is_refused_in_a_sentence(folder, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2)
        assert run(command(folder, tmp_path / "out", "--checkpoint", tmp_path / "kept")) == 130
    capsys.readouterr()
    given = ("--checkpoint", tmp_path / "kept", "--weighting", "sequence")
    assert run(command(folder, tmp_path / "out", *given)) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "is of another probe: other estimate option weighting ('dr_grpo' there, 'sequence' here)" in said
    assert "what to do: make the very call that wrote it" in said


def test_a_run_folder_says_nothing_of_where_to_write(folder, tmp_path, capsys):
    path = folder / "run.json"
    before = path.read_text()
    document = json.loads(before)
    assert document["probe"]["run"]["checkpoint"] is None
    document["probe"]["run"]["checkpoint"] = str(tmp_path / "elsewhere")
    path.write_text(json.dumps(document))
    try:
        assert run(command(folder, tmp_path / "out")) == 3
    finally:
        path.write_text(before)
    assert "names a checkpoint" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "elsewhere").exists()
    assert read_manifest(folder).run.checkpoint is None
