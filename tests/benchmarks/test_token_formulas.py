"""Forecasts beside token-local formulas, and what a forecast from a sample costs: formulas by loops, commands whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from own_benchmarks import make_importable
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_importable(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_formulas_are_their_definitions() -> None:
    from benchmarks.token_formulas import FORMULAS, formulas

    model, rollouts = models.tiny_transformer().eval(), make_rollouts(Shape(), models.VOCABULARY)
    tokens = []  # log-prob, entropy, advantage, derivative of the entropy by this token's own logits along the update
    for row in range(rollouts.n_sequences):
        real = [t for t in range(rollouts.input_ids.shape[1]) if rollouts.attention_mask[row, t] == 1]
        ids = rollouts.input_ids[row, real][None]
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(real))[None])
        assert rollouts.advantages is not None
        advantage = float(rollouts.advantages[row])
        for t in range(1, len(real)):
            if rollouts.loss_mask[row, real[t]] == 1:
                z = out.logits[0, t - 1].clone().requires_grad_()
                log_p = z.log_softmax(0)
                entropy = -(log_p.exp() * log_p).sum()
                (slope,) = torch.autograd.grad(entropy, z)
                step = -log_p.detach().exp()
                step[ids[0, t]] += 1
                tokens.append((float(log_p[ids[0, t]]), float(entropy), advantage, float(slope @ step)))
    s, H, A, own = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    p = s.exp()
    expected = (
        -float(((s - s.mean()) * (A - A.mean())).sum()),
        -float((A * p * (1 - p) * (s + H)).sum()),
        -float((A * p * (s + H)).sum()),
        float((A * own).sum()),
        float((A * own.sign()).sum()),
    )
    found = formulas(model, rollouts)
    assert list(found) == list(FORMULAS)
    for name, value in zip(FORMULAS, expected, strict=True):
        assert math.isclose(found[name], value, rel_tol=1e-9), name


@pytest.mark.exhaustive
def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import token_formulas

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_formulas.main(["--quick", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "token_formulas.json").read_text())["records"]
    assert len(records) == 2
    for record in records:
        # Where no prompt's rewards differ, which is a matter of a draw, this batch has no gradient of its own.
        signal = record["direct, adam_static"] != 0
        assert 0 < record["crossing"] < 1 if signal else math.isnan(record["crossing"])
        assert record["direct, next"] == pytest.approx(record["direct"], rel=0.5)


def test_a_sampled_forecast_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.probe import live

    assert live.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "probe_live.json").read_text())
    assert [row["prompts"].split()[0] for row in found["rows"][:3]] == ["2", "3", "6"]
    assert "WRONG" not in capsys.readouterr().out


def test_a_wrong_one_gets_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.probe import live

    monkeypatch.setattr(live, "complaint", lambda setting, found: "WRONG: on purpose")
    assert live.main(["--quick", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "probe_live.json").exists()
