"""How often intervals cover: the command runs, its batches are the package's, and what it counts can be worked out by hand."""

from __future__ import annotations

import itertools
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


@pytest.fixture(scope="module")
def transformer() -> Any:
    """A simulation with it; its gradients take some seconds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_importable(monkeypatch)
        from benchmarks.error_bars import Simulation
        from benchmarks.small_transformer import policy_with

        return Simulation(policy_with("ordinary", "transformer"), fitted=True)


def tables(rewards: str) -> Any:
    from benchmarks import coverage
    from benchmarks.error_bars import Simulation

    return coverage.Tables(Simulation(coverage.policy_with(rewards), fitted=True))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import coverage

    assert coverage.main(["--quick", "--replications", "12", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "WRONG" not in shown and "12 replications" in shown
    written = json.loads((tmp_path / "coverage.json").read_text())
    found = written["found"]
    worlds = [(policy, rewards) for policy in coverage.POLICIES for rewards in coverage.WORLDS[policy]]
    assert list(dict.fromkeys((of["policy"], of["rewards"]) for of in found)) == worlds and len(worlds) == 5
    assert len(found) == len(worlds) * len(coverage.QUICK) * len(coverage.QUANTITIES) * len(coverage.TARGETS)
    for of in found:
        assert (" of rows" in "".join(of["methods"])) == (of["target"] == "such updates")
        for method in of["methods"].values():
            assert 0 <= method["coverage"] <= 1
            assert math.isclose(method["coverage"] + method["too_low"] + method["too_high"], 1)
        assert sum(kind["cases"] for kind in of["by_share"].values()) == 12
        assert sum(kind["cases"] for kind in of["by_jackpots"].values()) == 12
    # Every row of the tables is there.
    for policy, rewards in worlds:
        for target in coverage.TARGETS:
            assert f"**Policy {policy}, rewards {rewards}, {target}**" in shown
    assert shown.count("| visitation | 8 | 4 |") == 10
    for policy in coverage.POLICIES:
        assert shown.count(f"policy {policy}; all settings with B >= 8 together") == 2


def test_one_policy_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import coverage

    monkeypatch.setattr(coverage, "WORLDS", {"toy": ("ordinary",)})
    assert coverage.main(["--quick", "--policy", "toy", "--replications", "12", "--out", str(tmp_path)]) == 0
    assert "transformer" not in capsys.readouterr().out
    assert {of["policy"] for of in json.loads((tmp_path / "coverage.json").read_text())["found"]} == {"toy"}


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
    assert "WRONG: policy toy, B 8, G 4: " in shown and "replications" not in shown


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


@pytest.mark.exhaustive
def test_the_transformer_is_one(transformer: Any) -> None:
    """Every response to every prompt, run through the network on its own with an ordinary causal mask."""
    policy = transformer.policy
    prompts, responses = policy.prompt_tokens, policy.responses
    assert len(set(prompts)) == policy.prompts == 8 and {len(prompt) for prompt in prompts} == {2, 3}
    assert len(set(responses)) == 85 and all(0 not in response[:-1] for response in responses)
    s, h = torch.zeros(2, 8, len(responses), 3, dtype=torch.float64)
    for p, prompt in enumerate(prompts):
        for r, response in enumerate(responses):
            tokens = torch.tensor([prompt + response[:-1]])
            count = tokens.shape[1]
            sees = torch.ones(1, count, count).tril().bool()
            following = policy.following(policy.theta, tokens, torch.arange(count)[None], sees)[0, len(prompt) - 1 :]
            s[p, r, : len(response)] = following[range(len(response)), list(response)]
            h[p, r, : len(response)] = torch.distributions.Categorical(logits=following).entropy()
    torch.testing.assert_close(transformer.s, s, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transformer.h, h, rtol=1e-12, atol=1e-12)
    probability = policy.logprob_table.exp()
    torch.testing.assert_close(probability.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.exhaustive
def test_gradients_of_the_transformer(transformer: Any) -> None:
    policy = transformer.policy
    theta = policy.theta.clone().requires_grad_()
    s, h = policy.token_values(theta)
    response = policy.responses.index((2, 3, 1))
    for values, gradients in ((s, transformer.ds), (h, transformer.dh)):
        for token in range(3):
            (row,) = torch.autograd.grad(values[4, response, token], theta, retain_graph=True)
            assert float(row.abs().max()) > 0
            torch.testing.assert_close(gradients[4, response, token], row, rtol=1e-11, atol=1e-13)
    # Of everything, in some direction.
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6 * direction
    above, below = (policy.token_values(policy.theta + sign * step) for sign in (1, -1))
    for up, down, gradients in zip(above, below, (transformer.ds, transformer.dh), strict=True):
        torch.testing.assert_close((up - down) / 2e-6, gradients @ direction, rtol=1e-6, atol=1e-7)


@pytest.mark.exhaustive
def test_how_the_transformer_was_trained(transformer: Any) -> None:
    from benchmarks import small_transformer

    policy = transformer.policy
    state = torch.get_rng_state()
    again = small_transformer.policy_with("jackpot", "transformer")
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers
    assert torch.equal(again.theta, policy.theta)  # whatever a jackpot is worth
    probability = policy.logprob_table.exp()
    for p, q in itertools.combinations(probability, 2):
        assert float((p - q).abs().sum() / 2) > 0.1  # prompts differ
    untrained = policy.logprobs(torch.nn.utils.parameters_to_vector(policy.network.parameters())).detach().exp()
    gained = ((probability - untrained) * policy.rewards).sum(1)
    assert float(gained.min()) > 0 and float(gained.mean()) > 0.3
    assert float(probability.max()) < 0.8  # it is far from having decided everywhere
    rare = small_transformer.jackpot_responses(again)
    share = probability.gather(1, rare[:, None])
    assert float(share.min()) >= 0.003 and float(share.max()) < 0.004
    changed = again.rewards != policy.rewards
    assert torch.equal(changed, torch.nn.functional.one_hot(rare, 85).bool())


@pytest.mark.exhaustive
def test_the_transformers_batches_are_what_the_package_makes_of_them(transformer: Any) -> None:
    from benchmarks import coverage

    here = coverage.Tables(transformer)
    assert coverage.wrong(here, 6, 3) == []
    here.direct = 1.001 * here.direct
    assert any("X of direct" in sentence for sentence in coverage.wrong(here, 6, 3))
