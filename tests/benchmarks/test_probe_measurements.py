"""Memory, growth, stages and operations, each held against something that is known."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from own_benchmarks import make_importable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    make_importable(monkeypatch)


KNOWN_ALLOCATIONS = """
import torch
from benchmarks.kernels.memory import peak_of_process

MIB = 2**20

def held(mib):
    return torch.ones(mib * MIB // 4)

def one_after_the_other():
    for _ in range(3):
        held(96)

def together():
    first, second = held(96), held(64)

def rise_and_fall():
    together()
    return held(32)

kept = held(128)  # there before, so not counted
for call, expected in ((one_after_the_other, 96), (together, 160), (rise_and_fall, 160), (lambda: None, 0)):
    found = peak_of_process(call) / MIB
    assert abs(found - expected) < 3, (call, found, expected)
"""


def test_the_peak_of_known_allocations() -> None:
    # In a process of its own, as every measurement is: in one that has run other tests, what its allocator keeps would count.
    done = subprocess.run(
        [sys.executable, "-c", KNOWN_ALLOCATIONS],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
# 16 rows of 17 and of 32 positions, float32. Backward holds logits and their gradient; the frozen way log-probs too.
@pytest.mark.parametrize(
    ("contender", "low", "high"),
    [("frozen", 3 * 128, 5 * 128), ("plain_step", 2 * 68, 3 * 68)],
)
def test_memory_of_a_contender_is_that_of_its_logits(contender: str, low: int, high: int) -> None:
    from benchmarks.probe.memory import in_own_process
    from benchmarks.probe.workloads import Workload

    workload = Workload(
        "logits",
        16,
        16,
        vocabulary=2**16,
        hidden=32,
        intermediate=48,
        layers=1,
        heads=4,
        rank=4,
        prompts=4,
        responses=4,
    )
    assert low < in_own_process(workload, contender, None) / MIB < high


def test_exponents_of_known_powers() -> None:
    from benchmarks.probe.growth import AXES, LENGTH, exponent, fitted, outcomes

    sizes = (8, 16, 32, 48, 80)
    assert exponent(sizes, [3 * s**1.3 for s in sizes]) == pytest.approx(1.3)
    axis = next(a for a in AXES if a.field == LENGTH)
    times = [0.5 + 0.01 * s + 2e-4 * s**2 for s in axis.sizes]
    grown = fitted(axis, times)
    longest = axis.sizes[-1]
    assert grown.quadratic_share == pytest.approx(2e-4 * longest**2 / times[-1], rel=1e-6)
    assert grown.exponent_of_the_rest == pytest.approx(exponent(axis.sizes, [0.5 + 0.01 * s for s in axis.sizes]))
    assert grown.exponent == pytest.approx(exponent(axis.sizes, times)) and grown.exponent > grown.exponent_of_the_rest
    # Without a quadratic part there is none to find, and no negative one either.
    for linear in ([0.1 * s for s in axis.sizes], [s**0.8 for s in axis.sizes]):
        assert fitted(axis, linear).quadratic_share == pytest.approx(0, abs=1e-9)
    # Cubic growth is not attention's, and the target sees it.
    (outcome,) = outcomes([fitted(axis, [1e-6 * s**3 for s in axis.sizes])])
    assert outcome.verdict == "MISSED"


def test_sizes_span_a_decade_and_change_one_field() -> None:
    from benchmarks.probe.growth import AXES

    for axis in AXES:
        assert axis.sizes[-1] / axis.sizes[0] == 10 and list(axis.sizes) == sorted(axis.sizes)
        assert getattr(axis.workload(axis.sizes[1]), axis.field) == axis.sizes[1]
        assert not axis.base.ragged


class ManualClock:
    """Stands still until it is told that time has passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.probe import stages

        self.now = 0.0
        monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_time_goes_to_the_stage_of_the_innermost_frame_that_a_rule_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.probe.stages import CHECKS, REST, Rule, StageClock

    hands = ManualClock(monkeypatch)

    def busy(seconds: int) -> None:
        hands.now += seconds

    def outer() -> None:
        busy(2)
        inner()
        busy(2)
        careful_check()

    def inner() -> None:
        busy(6)

    def careful_check() -> None:
        busy(1)
        inner()

    here = r"test_probe_measurements"
    rules = [
        Rule(CHECKS, here, "^careful_check$"),
        Rule("out", here, "^outer$"),
        Rule("in", here, "^inner$", ("out", CHECKS)),
    ]
    clock = StageClock(rules)
    assert clock.run(outer) == 17
    found = {stage: clock.seconds[stage] for stage in ("out", "in", CHECKS, REST)}
    assert found == {"out": 4, "in": 6, CHECKS: 7, REST: 0} and sum(clock.seconds.values()) == 17
    assert sys.getprofile() is None
    with pytest.raises(ZeroDivisionError):
        StageClock(rules).run(lambda: 1 / 0)
    assert sys.getprofile() is None


class Work(TorchDispatchMode):
    """Time passes with the elements that operations read and write."""

    def __init__(self, hands: ManualClock) -> None:
        super().__init__()
        self._hands = hands

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self._hands.now += sum(t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def test_the_rules_know_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the elements that pass through each stage, which no other process changes."""
    from benchmarks.probe.contenders import one_pass_result
    from benchmarks.probe.setting import build
    from benchmarks.probe.stages import REST, STAGES, StageClock
    from benchmarks.probe.workloads import QUICK

    # Of a size at which setting up is not most of the work.
    setting = build(dataclasses.replace(QUICK[0], response_length=48, hidden=128, intermediate=256, vocabulary=2048))
    one_pass_result(setting)
    clock = StageClock()
    with Work(ManualClock(monkeypatch)):
        total = clock.run(lambda: one_pass_result(setting))
    assert all(clock.seconds[stage] > 0 for stage in STAGES), clock.seconds
    assert clock.seconds[REST] < 0.1 * total


def test_operations_are_those_that_torch_counts() -> None:
    from benchmarks.probe.operations import necessary
    from benchmarks.probe.setting import build
    from benchmarks.probe.workloads import Workload

    workload = Workload("count", 6, 5, 64, 32, 48, 2, 4, 2, rank=4, prompts=3, responses=2, ragged=False)
    setting = build(workload)
    found = necessary(setting)
    tokens = 11
    with FlopCounterMode(display=False) as counter:
        setting.model(setting.update.input_ids[:1]).logits.sum().backward()
    products = ("mm", "addmm", "bmm")
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in products)
    N_p, N_r = 3 * 6, 3 * 2 * 5
    per_token = found.forward / (N_p + N_r) + found.backward / (2 * N_p + N_r) + found.captured / 2 / (N_p + N_r)
    assert counted == tokens * (per_token + found.output_layer / N_r)
    # A prompt's 6 tokens look at 1 to 6; a response's 5 at 7 to 11. Scores and values forward, four products backward.
    prompts, responses = 3 * 21, 6 * 45
    assert found.attention == 2 * 32 * 2 * (2 * (prompts + responses) + 4 * (2 * prompts + responses))
    assert found.kernel == 2 * 3 * 3 * sum(p.numel() for p in setting.trained.values())
    assert found.total == pytest.approx(
        found.forward + found.backward + found.attention + found.output_layer + found.captured + found.kernel
    )


def test_text_is_sampled_once_and_scored_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.probe import text_rollouts
    from benchmarks.probe.padded import padded_of
    from benchmarks.probe.workloads import SMOL
    from entropy_fast import Rollouts

    sampled = Rollouts(
        input_ids=torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 0, 0], [4, 3, 2, 1, 9], [4, 3, 2, 8, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1] * 5, [1, 1, 1, 1, 0]]),
        loss_mask=torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]),
        group_ids=torch.tensor([0, 0, 1, 1]),
        rewards=torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        max_lengths=4,
        temperature=1.0,
        top_p=1.0,
    )
    calls = []
    monkeypatch.setattr(text_rollouts, "load_tokenizer", lambda source: None)
    monkeypatch.setattr(text_rollouts, "sample_rollouts", lambda *a, **k: calls.append(a) or sampled)
    file = tmp_path / "new" / "rollouts.jsonl"
    first, again = (text_rollouts.text_rollouts(torch.nn.Identity(), SMOL, file) for _ in range(2))
    assert len(calls) == 1 and torch.equal(first.advantages, again.advantages)
    assert bool((first.advantages.abs() > 0).all())  # also of the group whose rewards are all alike
    padded = padded_of(first)
    assert padded.ids.tolist() == [
        [[0, 5, 6, 7, 8], [0, 5, 6, 9, 0]],
        [[4, 3, 2, 1, 9], [4, 3, 2, 8, 0]],
    ]
    assert padded.scored.tolist() == [[[1, 1], [1, 0]], [[1, 1], [1, 0]]]
    assert padded.positions[0, 0].tolist() == [0, 0, 1, 2, 3] and padded.budgets.tolist() == [4, 4]
