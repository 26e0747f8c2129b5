"""The checklist: what it says of a healthy model, and of each thing that would spoil a probe."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_policy import policy, saved_run

from entropy_fast import EstimateOptions, RunOptions, read_rollouts
from entropy_fast.cli.app import run
from entropy_fast.report.doctor import check_model, verdict
from entropy_fast.report.doctor_rows import few_short_rows, prompts_with_advantage, synthetic_rollouts
from entropy_fast.rollouts import Rollouts
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model
from entropy_fast.step import adam_state_from_file


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(stored, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COLUMNS", "300")
    return Path(shutil.copytree(stored, tmp_path / "run"))


def checked(folder, change=lambda model: None, rollouts=None, state=True, **options):
    model = attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")
    known = adam_state_from_file(folder / "optimizer.pt", model) if state else None
    change(model)
    batch = read_rollouts(folder / "rollouts.jsonl") if rollouts is None else rollouts
    checks = check_model(model, known, batch, **options)
    return {check.name: check for check in [*checks, verdict(checks)]}


def test_a_healthy_model(folder):
    found = checked(folder)
    assert {check.passed for check in found.values()} <= {True, None}
    assert found["verdict"].passed is True
    assert "will run" in found["verdict"].detail
    assert "Plan: " in found["engine one_pass"].detail
    assert found["one_pass agrees with two_pass"].passed is True
    gradients = [check for name, check in found.items() if name.endswith(" gradients")]
    assert len(gradients) == 2
    for check in gradients:
        assert float(check.detail.rpartition(" ")[2]) > 0  # the norm


def test_the_command_shows_it_and_its_verdict(folder, capsys):
    assert run(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    for name in ("grad context", "optimizer", "ops backend native", "dropout off", "engine one_pass", "will run"):
        assert name in shown
    assert "FAIL" not in shown
    assert run(["doctor", "--model", str(folder / "base"), "--adapter", str(folder / "adapter")]) == 0
    shown = capsys.readouterr().out
    assert "not given: coverage" in shown
    assert "whether the optimizer fits it was not checked" in shown
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("reference", "native", "triton", "cuda"):
        assert f"ops backend {name}" in shown


def test_the_options_of_the_run_folder_are_tried(folder):
    options = RunOptions(engine="jvp", by_sequence=True, conditional_variance="alpha")
    found = checked(folder, estimate=EstimateOptions(entropy_estimator="rao_blackwell", blocks=2), run=options)
    assert found["verdict"].passed is True
    assert (
        "X and Y take a backward each" in found["engine one_pass"].detail
        or "backward" in found["engine one_pass"].detail
    )


@pytest.mark.parametrize("cut", [{"temperature": 0.7}, {"top_k": 3}, {"min_p": 0.1}])
def test_rollouts_sampled_otherwise_fail(folder, capsys, cut):
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps({**row, **cut}) + "\n" for row in rows))
    assert run(["doctor", str(folder)]) == 3
    shown = capsys.readouterr().out
    assert "FAIL" in shown
    assert "see sampled at temperature 1" in shown


def test_a_learning_rate_of_zero_fails_and_the_rest_goes_on(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["param_groups"][0]["lr"] = 0.0
    torch.save(saved, folder / "optimizer.pt")
    found = checked(folder)
    assert found["learning rate"].passed is False
    assert found["one_pass agrees with two_pass"].passed is True
    assert found["verdict"].detail.endswith("see learning rate")


def test_a_batch_without_any_advantage_fails(folder):
    batch = read_rollouts(folder / "rollouts.jsonl")
    nothing = dataclasses.replace(batch, advantages=torch.zeros(batch.n_sequences), rewards=None)
    found = checked(folder, rollouts=nothing)
    assert found["prompts with an advantage"].passed is False
    assert found["verdict"].passed is False


def test_noise_in_a_forward_fails(folder):
    def noisy(model):
        model.get_base_model().lm_head.register_forward_hook(lambda m, i, out: out + torch.randn_like(out))

    assert checked(folder, noisy)["dropout off"].passed is False


def test_sequences_that_interact_fail(folder):
    def mixing(model):
        model.get_base_model().model.norm.register_forward_hook(lambda m, i, out: out + out.mean(0, keepdim=True))

    assert checked(folder, mixing)["sequences do not interact"].passed is False


def test_a_parameter_without_a_gradient_fails(folder):
    def unused(model):
        model.register_parameter("stray", torch.nn.Parameter(torch.ones(3)))

    found = checked(folder, unused, state=False)
    assert any(check.passed is False and "stray" in check.detail for check in found.values())


def test_an_optimizer_that_never_stepped_fails(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["state"] = {}
    torch.save(saved, folder / "optimizer.pt")
    found = checked(folder)
    assert found["verdict"].passed is False


def batch_of(advantages, lengths, prompt=3):
    """Three responses to each prompt; tokens count upward, so that no two rows are alike."""
    n, width = len(advantages), prompt + max(lengths)
    ids = torch.arange(n)[:, None] * 1000 + torch.arange(width)[None]
    groups = torch.arange(n) // 3
    ids[:, :prompt] = groups[:, None]
    mask = (torch.arange(width)[None] < prompt + torch.tensor(lengths)[:, None]).long()
    loss = mask.clone()
    loss[:, :prompt] = 0
    return Rollouts(ids, mask, loss, groups, advantages=torch.tensor(advantages, dtype=torch.float64), max_lengths=500)


def test_few_rows_are_short_and_have_an_advantage():
    advantages = [0.0, 0, 0, 1, 0, -2, 0, 0, 0, 0.5, 0.5, -1]
    batch = batch_of(advantages, [4] * 9 + [100] * 3, prompt=90)
    assert prompts_with_advantage(batch) == [1, 3]
    few = few_short_rows(batch)
    assert few.group_ids.tolist() == [1, 1, 3, 3]
    assert few.advantages.tolist() == [-2.0, 1.0, -1.0, 0.5]
    assert few.attention_mask.sum(-1).tolist() == [36, 36, 64, 64]
    assert few.loss_mask.sum(-1).tolist() == [4, 4, 32, 32]
    assert few.input_ids[0, 31:36].tolist() == [1, 5090, 5091, 5092, 5093]
    assert few.length_budgets.tolist() == [500, 500]


def test_responses_told_apart_come_before_those_that_are_not():
    batch = batch_of([1.0, 0, -1] * 3, [40] * 9)
    ids = batch.input_ids.clone()
    ids[:3, 3:38] = 7  # alike where they are cut
    few = few_short_rows(dataclasses.replace(batch, input_ids=ids))
    assert sorted(set(few.group_ids.tolist())) == [1, 2]


def test_synthetic_rows_fit_any_model():
    rows = synthetic_rollouts(policy().config.vocab_size)
    assert len(prompts_with_advantage(rows)) == rows.n_prompts == 2
