"""The probe benchmark gives wrong numbers no speed, and what it measures is what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from own_benchmarks import make_importable

if TYPE_CHECKING:
    from benchmarks.probe.measure import Measured
    from benchmarks.probe.setting import Setting

ROOT = Path(__file__).parents[2]
SUMS = ("diagonal", "row_sums", "column_sums")


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_importable(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quick(name: str) -> Setting:
    from benchmarks.probe.setting import build
    from benchmarks.probe.workloads import QUICK

    return build(next(w for w in QUICK if w.name == name))


def float64_gradients(setting: Setting) -> dict[str, list[torch.Tensor]]:
    """Flat X_n and g_n of every prompt of the update batch: float64, one unpadded response at a time."""
    rollouts, model = setting.update, setting.model.double()
    trained = list(setting.trained.values())
    found: dict[str, list[torch.Tensor]] = {"X": [], "g": []}
    for prompt in range(rollouts.n_prompts):
        rows = rollouts.rows_of_prompt(prompt).tolist()
        S, gradients = [], []
        for row in rows:
            tokens = rollouts.input_ids[row][rollouts.attention_mask[row] == 1]
            length = int(rollouts.response_lengths[row])
            logprobs = model(tokens[None]).logits[0].log_softmax(-1)
            value = sum(logprobs[t - 1, tokens[t]] for t in range(len(tokens) - length, len(tokens)))
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, trained)]))
            S.append(float(value.detach()) / float(rollouts.length_budgets[prompt]))
        G = len(rows)
        x = torch.zeros_like(gradients[0])
        g = torch.zeros_like(gradients[0])
        for i, row in enumerate(rows):
            baseline = sum(S[j] for j in range(G) if j != i) / (G - 1)
            x += -(S[i] - baseline) / G * gradients[i]
            g += float(rollouts.advantages[row]) / float(rollouts.length_budgets[prompt]) / G * gradients[i]
        found["X"].append(x)
        found["g"].append(g)
    return found


def scales(setting: Setting) -> torch.Tensor:
    flat = []
    for parameter in setting.trained.values():
        state = setting.optimizer.state[parameter]
        root = torch.sqrt(state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"])))
        flat.append(torch.where(root > 0, 1 / (root + 1e-8), 0).flatten())
    return torch.cat(flat)


@pytest.mark.parametrize("workload", ["short", "full"])
def test_every_contender_finds_what_unpadded_float64_finds(workload: str) -> None:
    from benchmarks.probe.contenders import CONTENDERS, PLAIN

    setting = quick(workload)
    results = {c.name: c.run(setting) for c in CONTENDERS if 1 in c.batches and c.name != PLAIN and not c.why_not()}
    assert len(results) >= 4
    truth, scale = float64_gradients(setting), scales(setting)
    K = torch.stack(truth["X"]) @ (torch.stack(truth["g"]) * scale).T
    expected = {"diagonal": K.diagonal(), "row_sums": K.sum(1), "column_sums": K.sum(0)}
    for name, sums in results.items():
        assert sums.x_dot_y == pytest.approx(float(K.sum()), abs=1e-5 * float(K.abs().sum())), name
        for number in SUMS:
            torch.testing.assert_close(
                getattr(sums, number), expected[number], rtol=0, atol=1e-5 * float(expected[number].norm()), msg=name
            )


@pytest.mark.parametrize("workload", ["short", "full"])
def test_the_plain_step_leaves_the_gradient_of_the_update(workload: str) -> None:
    from benchmarks.probe.plain_step import plain_step

    setting = quick(workload)
    plain_step(setting.model, setting.padded, contextlib.nullcontext())
    found = torch.cat([p.grad.double().flatten() for p in setting.trained.values()])
    setting.model.zero_grad(set_to_none=True)
    expected = -sum(float64_gradients(setting)["g"])
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def test_the_contenders_leave_the_model_as_it_was() -> None:
    from benchmarks.probe.contenders import CONTENDERS, PLAIN

    setting = quick("short")
    before = {name: tensor.clone() for name, tensor in setting.model.state_dict().items()}
    for contender in CONTENDERS:
        if 1 in contender.batches and contender.name != PLAIN and not contender.why_not():
            contender.run(setting)
            assert all(p.grad is None for p in setting.model.parameters()), contender.name
            assert all(getattr(p, "grad_sample", None) is None for p in setting.model.parameters()), contender.name
            assert setting.model.training and not any(m._backward_hooks for m in setting.model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in setting.model.state_dict().items())


def measured_with(change: Callable[[object], object], name: str = "one_pass", workload: str = "short") -> Measured:
    """The quick workload, without memory, with the result of one contender changed."""
    from benchmarks.probe.contenders import CONTENDERS
    from benchmarks.probe.measure import Effort, measure

    def changed(contender):  # type: ignore[no-untyped-def]
        return dataclasses.replace(contender, run=lambda s: change(contender.run(s)))

    among = [changed(c) if c.name == name else c for c in CONTENDERS if c.name in (name, "plain_step", "two_pass")]
    effort = Effort(repeat=2, slow_repeat=1, memory=False)
    return measure(quick(workload).workload, effort, among=among)


def with_number(number: str, factor: float) -> Callable[[object], object]:
    def change(sums):  # type: ignore[no-untyped-def]
        value = getattr(sums, number)
        if number == "x_dot_y":
            return dataclasses.replace(sums, x_dot_y=value * factor)
        # One prompt's alone, so that no sum over prompts is what gives it away.
        return dataclasses.replace(sums, **{number: torch.cat([value[:1] * factor, value[1:]])})

    return change


# What is not a number is held to the same comparison: one of them says so.
@pytest.mark.parametrize(
    ("number", "factor"),
    [
        ("x_dot_y", 1.01),
        ("x_dot_y", float("nan")),
        *(pytest.param(number, 1.01, marks=pytest.mark.exhaustive) for number in SUMS),
        *(pytest.param(number, float("nan"), marks=pytest.mark.exhaustive) for number in SUMS),
    ],
)
def test_a_wrong_number_gets_no_speed(number: str, factor: float) -> None:
    from benchmarks.probe import report
    from benchmarks.probe.targets import TARGETS, outcomes

    found = measured_with(with_number(number, factor))
    assert set(found.wrong) == {"one_pass"} and "one_pass" not in found.times
    assert "one_pass" not in found.peaks and found.speed_up("one_pass") is None
    row = next(row for row in report.rows(found) if row[0] == "one_pass")
    assert row[1].startswith("WRONG, no speed: ") and not any(row[2:])
    assert found.workload.name in TARGETS
    assert {o.verdict for o in outcomes([found])} == {"not measured"}


def test_a_right_one_does() -> None:
    found = measured_with(lambda sums: sums)
    assert not found.wrong and not found.missing
    assert {name: len(times) for name, times in found.times.items()} == {"plain_step": 2, "one_pass": 2, "two_pass": 1}


def test_a_plain_step_that_scores_other_tokens_is_wrong() -> None:
    for workload in ("short", "half"):
        found = measured_with(lambda S: S * 1.01, "plain_step", workload)
        assert set(found.wrong) == {"plain_step"} and "sequence_logprobs" in found.wrong["plain_step"]


def test_half_precision_is_held_to_float32() -> None:
    from benchmarks.probe.check import FLOAT32, complaint, expected_of
    from benchmarks.probe.contenders import CONTENDERS

    setting = quick("half")
    expected = expected_of(setting, None)
    assert setting.workload.bfloat16 and FLOAT32 < max(expected.allowed.values()) < 0.05
    for contender in CONTENDERS:
        if contender.name in ("plain_step", "one_pass", "frozen"):
            assert complaint(contender.run(setting), expected) == "", contender.name


def crash(_: object) -> object:
    raise RuntimeError("no batching rule\nand more")


@pytest.mark.exhaustive
def test_a_rival_that_cannot_run_has_its_reason_in_the_table() -> None:
    from benchmarks.probe import report

    found = measured_with(crash, "vmap")
    assert found.missing == {"vmap": "RuntimeError: no batching rule"} and not found.wrong
    assert ["vmap", "cannot run: RuntimeError: no batching rule", *[""] * 5] in report.rows(found)
    assert "one_pass" in measured_with(crash, "one_pass").wrong  # an engine has no such excuse


def test_a_wrong_engine_ends_the_command_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.probe import contenders
    from benchmarks.probe.__main__ import main

    right = contenders.probe

    def wrong(setting, engine, **options):  # type: ignore[no-untyped-def]
        result = right(setting, engine, **options)
        return dataclasses.replace(result, row_sums=-result.row_sums) if engine == "one_pass" else result

    monkeypatch.setattr(contenders, "probe", wrong)
    arguments = [
        "--quick",
        "--repeat",
        "1",
        "--no-memory",
        "--workloads",
        "short",
        "--contenders",
        "one_pass,plain_step",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert "WRONG, no speed" in capsys.readouterr().out
    (workload,) = json.loads((tmp_path / "probe_cpu.json").read_text())["workloads"]
    assert set(workload["times"]) == {"plain_step"}


@pytest.mark.exhaustive
def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--quick", "--threads", "1", "--repeat", "1", "--no-memory", "--growth", "--profile", "--out"]
    monkeypatch.setattr(sys, "argv", ["probe", *options, str(tmp_path)])
    # As `python -m` does, in this process, which has imported everything.
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.probe", run_name="__main__")
    assert ended.value.code in (0, None)
    content = json.loads((tmp_path / "probe_cpu.json").read_text())
    assert [w["workload"]["name"] for w in content["workloads"]] == ["short", "two_batches", "full", "half"]
    for workload in content["workloads"]:
        assert not workload["wrong"] and {"plain_step", "one_pass", "two_pass"} <= set(workload["times"])
        assert ("alpha" in workload["times"]) == (workload["workload"]["batches"] == 2)
        assert ("frozen" in workload["times"]) == (workload["workload"]["batches"] == 1)
    assert content["targets"] == []  # of tiny sizes there are none
    assert (tmp_path / "probe_cpu.md").read_text().count("| one_pass |") == 4


def test_two_batches_cost_half_of_the_call_each() -> None:
    from benchmarks.probe.measure import Measured
    from benchmarks.probe.workloads import SHORT, TWO_BATCHES

    times = {"plain_step": [2.0, 4.0, 3.0], "one_pass": [1.0, 2.0, 3.0], "alpha": [8.0, 8.0], "frozen": [6.0]}
    two = Measured(TWO_BATCHES, times=times, peaks={"plain_step": 100, "one_pass": 40})
    assert two.in_plain_steps("one_pass").median == 0.25 and two.in_plain_steps("plain_step").median == 1
    assert two.speed_up("one_pass").median == 6  # of 8 and 4: the rounds that both were in
    assert two.memory_in_plain_steps("one_pass") == 0.4
    one = Measured(SHORT, times=times)
    assert one.in_plain_steps("one_pass").median == 0.5 and one.speed_up("one_pass").median == 6
    assert one.speed_up("plain_step") is None and one.memory_in_plain_steps("one_pass") is None


def test_targets_know_their_direction() -> None:
    from benchmarks.probe.targets import Outcome

    def verdict(measured: float | None, at_least: bool) -> str:
        return Outcome("short", "", 2.0, at_least, measured).verdict

    assert [verdict(v, True) for v in (1.9, 2.0, 2.1)] == ["MISSED", "reached", "reached"]
    assert [verdict(v, False) for v in (1.9, 2.0, 2.1)] == ["reached", "reached", "MISSED"]
    assert verdict(None, True) == "not measured" and verdict(math.nan, True) == verdict(math.nan, False) == "MISSED"


def test_few_rounds_for_what_is_slow() -> None:
    from benchmarks.kernels.timing import interleaved

    calls: list[str] = []
    actions = {name: lambda name=name: calls.append(name) for name in "AB"}
    times = interleaved(actions, "cpu", 3, warm_up=1, fewer={"B": 1})
    assert "".join(calls) == "ABABAA" and {name: len(t) for name, t in times.items()} == {"A": 3, "B": 1}


def test_the_page_is_filled(tmp_path: Path) -> None:
    from benchmarks.probe import document
    from benchmarks.probe.__main__ import main

    arguments = [
        "--quick",
        "--threads",
        "1",
        "--repeat",
        "1",
        "--no-memory",
        "--workloads",
        "short",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--contenders", "one_pass,plain_step"]) == 0
    content = json.loads((tmp_path / "probe_cpu.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    filled = document.filled(page, content)
    assert content["workloads"][0]["title"] in filled and content["machine"]["cpu"] in filled
    assert document.filled(filled, content) == filled
    # Not measured this time, so left alone.
    for name in ("probe-growth", "probe-profile"):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        assert filled.split(begin)[1].split(end)[0] == page.split(begin)[1].split(end)[0]
    with pytest.raises(ValueError, match="begin probe-machine"):
        document.filled("", content)
