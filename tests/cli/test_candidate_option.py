"""`entropy-fast probe --candidate`: what is typed is the update that is compared, or an error that lists what there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_policy import saved_run

from entropy_fast import candidates, fast_delta_h1, read_rollouts
from entropy_fast.cli.app import run
from entropy_fast.cli.candidate_option import CANDIDATES, candidate_updates
from entropy_fast.columns.functional import usual_functionals
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import ConfigError
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def test_all_ready_candidates_have_a_name():
    assert sorted(CANDIDATES) == sorted(set(candidates.__all__) - {"Candidate"})


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("clip_cov", candidates.clip_cov()),
        ("clip_cov=0.1", candidates.clip_cov(0.1)),
        ("clip_cov=0.1,0.5,2,7", candidates.clip_cov(0.1, 0.5, 2.0, 7)),
        ("clip_higher", candidates.clip_higher()),
        ("clip_higher=0.3, 0.1", candidates.clip_higher(0.3, 0.1)),
        ("entropy_bonus=-1e-2", candidates.entropy_bonus(-0.01)),
        ("kl_cov=0.01,2", candidates.kl_cov(0.01, 2.0)),
        (" reweighted = 0.1", candidates.reweighted(0.1)),
    ],
)
def test_what_is_typed_is_what_is_made(typed, expected):
    ((name, found),) = candidate_updates([typed], EstimateOptions()).items()
    assert name == typed.replace(" ", "")
    assert found.says == expected.says


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["clip"], "there is no candidate 'clip'"),
        ([""], "there is no candidate ''"),
        (["Candidate"], "there is no candidate 'Candidate'"),
        (["=0.1"], "there is no candidate ''"),
        (["entropy_bonus"], "'entropy_bonus' lacks a value, coefficient"),
        (["entropy_bonus="], "has '' for coefficient, which is not a number"),
        (["entropy_bonus=much"], "has 'much' for coefficient, which is not a number"),
        (["entropy_bonus=nan"], "has 'nan' for coefficient, which is not a number"),
        (["reweighted=1,-inf"], "has '-inf' for negative, which is not a number"),
        (["entropy_bonus=1,2"], "has 2 values, and entropy_bonus takes at most 1"),
        (["clip_cov=0.1,1,5,0.5"], "has '0.5' for seed, which is not an integer"),
    ],
)
def test_what_cannot_be_is_an_error_that_lists_what_there_is(typed, message):
    with pytest.raises(ConfigError) as caught:
        candidate_updates(typed, EstimateOptions())
    assert message in caught.value.problem
    assert all(name in caught.value.fix for name in CANDIDATES)
    assert "entropy_bonus=coefficient;" in caught.value.fix
    assert "kl_cov[=share,coefficient] (0.002,1 by default)" in caught.value.fix


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["clip_cov", "clip_cov"], "'clip_cov' is given twice"),
        (["clip_cov=0"], "clip_cov has share=0"),
        (["clip_cov=0.1,5,1"], "clip_cov has low=5.0 and high=1.0"),
        (["kl_cov=1.5"], "kl_cov has share=1.5"),
        (["clip_higher=-0.1"], "`clip_range`"),
    ],
)
def test_numbers_that_no_update_has(typed, message):
    with pytest.raises(ConfigError) as caught:
        candidate_updates(typed, EstimateOptions())
    assert message in caught.value.problem


def test_candidates_are_compared_in_the_table_and_in_the_result(folder, capsys):
    out = folder / "out"
    typed = ["--candidate", "clip_cov=0.2,-10,10", "--candidate", "entropy_bonus=0.01"]
    assert run(["probe", str(folder), "--out", str(out), "--no-picture", "--verbose", *typed]) == 0
    shown = capsys.readouterr().out
    assert "Updates compared" in shown
    for name in ("planned", "clip_cov=0.2,-10,10", "entropy_bonus=0.01"):
        assert name in shown
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    expected = fast_delta_h1(
        attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter"),
        folder / "optimizer.pt",
        rollouts,
        functionals=usual_functionals(rollouts),
        updates={
            "clip_cov=0.2,-10,10": candidates.clip_cov(0.2, -10.0, 10.0),
            "entropy_bonus=0.01": candidates.entropy_bonus(0.01),
        },
    )
    document = json.loads((out / "result.json").read_text())
    assert document["delta_h1"] == expected.delta_h1
    assert list(document["updates"]) == list(expected.updates)
    for name, forecasts in expected.updates.items():
        kept = document["updates"][name]
        assert kept["forecast"]["value"] == forecasts.forecast.value != expected.delta_h1
        assert kept["split"]["direct"]["value"] == forecasts.split.direct.value
        assert set(kept["functionals"]) == {"reward", "length"}


def test_without_candidates_there_are_none(folder, capsys):
    assert run(["probe", str(folder), "--out", str(folder / "out"), "--no-picture", "--verbose"]) == 0
    assert "Updates compared" not in capsys.readouterr().out
    assert json.loads((folder / "out" / "result.json").read_text())["updates"] == {}


@pytest.mark.parametrize(
    ("typed", "message", "status"),
    [
        ("warp", "use one of clip_cov[=share,low,high,seed]", 2),
        ("entropy_bonus=much", "which is not a number", 2),
        ("kl_cov", "kl_cov needs the update batch's `old_logprobs`", 3),
        ("clip_higher", "needs the update batch's `old_logprobs`", 3),
    ],
)
def test_a_wrong_candidate_is_a_message_and_leaves_nothing(folder, monkeypatch, capsys, typed, message, status):
    monkeypatch.setenv("COLUMNS", "900")
    out = folder / "out"
    assert run(["probe", str(folder), "--out", str(out), "--no-picture", "--candidate", typed]) == status
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not out.exists()
