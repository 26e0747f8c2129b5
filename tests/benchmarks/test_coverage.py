"""How often intervals cover: the command runs, its batches are the package's, and what it counts can be worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from own_benchmarks import make_importable
from torch import Tensor


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_importable(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tables(rewards: str) -> Any:
    from benchmarks import coverage
    from benchmarks.error_bars import Simulation

    return coverage.Tables(Simulation(coverage.policy_with(rewards), fitted=True))


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import coverage

    assert coverage.main(["--quick", "--replications", "12", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "WRONG" not in shown and "12 replications" in shown
    written = json.loads((tmp_path / "coverage.json").read_text())
    found = written["found"]
    assert len(found) == len(coverage.REWARDS) * len(coverage.QUICK) * len(coverage.QUANTITIES) * len(coverage.TARGETS)
    for of in found:
        assert (" of rows" in "".join(of["methods"])) == (of["target"] == "such updates")
        for method in of["methods"].values():
            assert 0 <= method["coverage"] <= 1
            assert math.isclose(method["coverage"] + method["too_low"] + method["too_high"], 1)
        assert sum(kind["cases"] for kind in of["by_share"].values()) == 12
        assert sum(kind["cases"] for kind in of["by_jackpots"].values()) == 12
    # Every row of the tables is there.
    for rewards in coverage.REWARDS:
        for target in coverage.TARGETS:
            assert f"**Rewards {rewards}, {target}**" in shown
    assert shown.count("| visitation | 8 | 4 |") == 6


@pytest.mark.parametrize("rewards", ["ordinary", "jackpot", "mostly equal"])
@pytest.mark.parametrize(("prompts", "size"), [(2, 2), (5, 3)])
def test_batches_are_what_the_package_makes_of_them(rewards: str, prompts: int, size: int) -> None:
    from benchmarks import coverage

    here = tables(rewards)
    # Two prompts have no jackknife.
    found = coverage.wrong(here, prompts, size) if prompts > 2 else []
    assert found == []
    state = here.simulation.generator.get_state()
    x, y = here.simulation.batch(prompts, size)
    here.simulation.generator.set_state(state)
    draws = coverage.drawn_from(here.simulation, (1, prompts), size)
    got, got_y = here.gradients(coverage.counted(*draws, len(here.lengths)))
    torch.testing.assert_close(got["visitation"][0], x["visitation"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got_y[0], y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("damaged", ["baseline", "score", "direct"])
def test_what_is_wrong_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    from benchmarks import coverage

    if damaged == "baseline":
        real = coverage.Tables.baseline
        monkeypatch.setattr(coverage.Tables, "baseline", lambda self, batches: 1.001 * real(self, batches))
    else:
        made = coverage.Tables.__init__

        def off(self: Any, simulation: Any) -> None:
            made(self, simulation)
            setattr(self, damaged, 1.001 * getattr(self, damaged))

        monkeypatch.setattr(coverage.Tables, "__init__", off)
    assert coverage.main(["--quick", "--replications", "2"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG: B 8, G 4: " in shown and "replications" not in shown


def known_intervals() -> dict[str, Tensor]:
    """Ten estimates that are off by 2, of a truth of 1; the first interval is too low and the last two are without a bound."""
    low, high = torch.full((10,), -3.0), torch.full((10,), 5.0)
    high[0] = 0.0
    low[8:] = -math.inf
    return {
        "value": 1 + 2 * torch.tensor([1.0, -1.0] * 5),
        "truth": torch.ones(10),
        "share": torch.tensor([0.01, 0.05, 0.15, 0.15, 0.3, 0.3, 0.3, 0.9, 1.0, math.nan]),
        "by_chance": torch.full((10,), 0.2),
        "jackpots": torch.tensor([0.0, 0, 0, 1, 1, 2, 3, 4, 9, 0]),
        "low student": low,
        "high student": high,
    }


def test_what_is_counted_of_known_intervals() -> None:
    from benchmarks import coverage

    found = coverage.summary(known_intervals())
    assert found["truth"] == 1 and found["spread"] == 2
    student = found["methods"]["student"]
    assert student["coverage"] == 0.9 and student["too_low"] == 0.1 and student["too_high"] == 0
    assert math.isclose(student["error"], math.sqrt(0.09 / 10))
    assert math.isclose(student["unbounded"], 0.2)
    assert math.isclose(student["half_width"], (7 * 4 + 1.5) / 8 / 2)
    assert student["median_half_width"] == 2
    shares = {kind: (of["cases"], of["student"]) for kind, of in found["by_share"].items()}
    assert shares == {"0": (2, 0.5), "1": (2, 1), "2": (3, 1), "3": (2, 1), "4": (1, 1)}
    jackpots = {kind: (of["cases"], of["student"]) for kind, of in found["by_jackpots"].items()}
    assert jackpots == {"0": (4, 0.75), "1": (2, 1), "2": (1, 1), "3": (3, 1)}
    assert coverage.cell(student) == "90.0 ± 9.5 · 1.84, 20.0% unbounded"


def test_worlds_are_as_they_are_described() -> None:
    from benchmarks import coverage

    ordinary, jackpot, equal = (coverage.policy_with(rewards) for rewards in coverage.REWARDS)
    probability = ordinary.logprob_table.exp()
    rare = coverage.jackpot_responses(ordinary)
    for prompt, response in enumerate(rare.tolist()):
        assert 0.003 < float(probability[prompt, response]) < 0.0145
        others = torch.cat([jackpot.rewards[prompt, :response], jackpot.rewards[prompt, response + 1 :]])
        assert math.isclose(float(jackpot.rewards[prompt, response] / others.mean()), 30)
    assert int((equal.rewards.std(1) < 1e-12).sum()) == 6


def test_coverage_in_a_world_of_normal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y is one vector and X normal around the truth, so that Student's interval for this update is exact."""
    from benchmarks import coverage

    here, generator = tables("ordinary"), torch.Generator().manual_seed(0)
    width = here.ds.shape[-1]
    truth = torch.ones(width, dtype=torch.float64)

    def gradients(batches: Any) -> tuple[dict[str, Tensor], Tensor]:
        shape = (*batches.prompt.shape, width)
        x = 1 + 50 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return dict.fromkeys(coverage.QUANTITIES, x), truth.expand(shape)

    monkeypatch.setattr(here, "gradients", gradients)
    monkeypatch.setattr(
        here.simulation, "population", lambda size: (dict.fromkeys(coverage.QUANTITIES, truth), truth.clone())
    )
    monkeypatch.setattr(coverage, "QUANTITIES", ("total",))
    cases = 4000
    this, _ = coverage.measured(here, 6, 4, cases)
    normal = 2 * scipy.stats.t(5).cdf(scipy.stats.norm.ppf(0.975)) - 1
    for method, expected in (("student", 0.95), ("normal", normal)):
        assert abs(this["methods"][method]["coverage"] - expected) < 6 * math.sqrt(expected * (1 - expected) / cases)
    assert math.isclose(this["spread"], 50 * math.sqrt(width / 6), rel_tol=6 / math.sqrt(2 * cases))
    # E s = c₄(6) σ
    half = scipy.stats.t(5).ppf(0.975) * math.sqrt(2 / 5) * math.gamma(3) / math.gamma(2.5)
    assert math.isclose(this["methods"]["student"]["half_width"], half, rel_tol=0.05)
