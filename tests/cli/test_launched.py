"""The command line started several times by a launcher: one result, one voice, one end."""

from __future__ import annotations

import json
from pathlib import Path

import launched_probe
import pytest
from process_groups import torchrun
from small_policy import saved_run

from entropy_fast.cli.app import run
from entropy_fast.cli.launched import launched_ranks, speaks
from entropy_fast.errors import ConfigError, DistributedError

PHASES = [
    "reading files",
    "loading the model",
    "agreement",
    "scores",
    "gradient sums",
    "influence kernel",
    "result",
    "writing",
]


def launched(monkeypatch, rank: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))


def lost(*ranks: int) -> DistributedError:
    return DistributedError("gone", fix="look", ranks=ranks, lost=ranks)


@pytest.mark.parametrize(
    ("error", "who"),
    [(None, [0]), (ConfigError("bad", fix="mend"), [0]), (lost(1), [0]), (lost(0), [1]), (lost(0, 1), [2])],
)
def test_the_first_of_those_that_are_left_speaks(monkeypatch, error, who):
    found = []
    for rank in range(3):
        launched(monkeypatch, rank)
        found += [rank] if speaks(error) else []
    assert found == who


def test_without_a_launcher_there_is_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert speaks(lost(0))
    with launched_ranks(5.0) as team:
        assert (team.rank, team.size) == (0, 1)


def test_all_ranks_need_a_process_group(tmp_path, capsys):
    folder = saved_run(tmp_path)
    assert run(["probe", str(folder), "--ranks", "all", "--out", str(tmp_path / "out")]) == 2
    assert "no process group" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [2, 4])
def test_torchrun_prints_and_writes_what_one_process_does(tmp_path, ranks, capsys):
    folder = saved_run(tmp_path)
    assert run(["probe", str(folder), "--out", str(tmp_path / "one"), "--no-picture"]) == 0
    alone = capsys.readouterr().out
    done = torchrun(ranks, "-m", "entropy_fast", "probe", folder, "--out", tmp_path / "all", "--no-picture")
    assert done.returncode == 0, done.stderr
    one, several = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "all"))
    for name in ("delta_h1", "std_error", "entropy_level"):
        assert several[name] == pytest.approx(one[name], rel=1e-4)
    assert len(several["kernel"]) == len(one["kernel"])
    assert done.stdout.count("δH₁  ") == alone.count("δH₁  ")  # printed once
    assert done.stdout.count("written: ") == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", range(len(PHASES)))
def test_a_rank_that_is_killed_under_torchrun_leaves_no_result_and_one_error(tmp_path, place):
    folder, out, failing = saved_run(tmp_path), tmp_path / "out", place % 2
    script = Path(launched_probe.__file__)
    arguments = ("probe", folder, "--out", out, "--no-picture", "--rank-timeout", 60)
    done = torchrun(2, script, failing, PHASES[place], *arguments)
    assert done.returncode != 0
    assert not (out / "result.json").exists()
    said = " ".join(done.stderr.split())
    assert said.count("error: rank") == 1, done.stderr
    assert f"error: rank {failing} is gone" in said and f"(it was at '{PHASES[place]}')" in said


@pytest.mark.exhaustive
def test_bad_input_is_said_once(tmp_path):
    folder = saved_run(tmp_path)
    (folder / "rollouts.jsonl").write_text("{}\n")
    done = torchrun(2, "-m", "entropy_fast", "probe", folder, "--out", tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("what to do:") == 1
