"""Memory that runs out in the middle of a sweep: the batch is cut finer, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_results import distance
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_rollouts, make_samples
from probe_models.snapshot import assert_unchanged, take_snapshot
from probe_options import options_of

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, Rollouts
from entropy_fast.capture import RowRecorder
from entropy_fast.columns import SequenceTable
from entropy_fast.engines.one_pass.runner import Runner
from entropy_fast.errors import EntropyFastWarning, ProbeMemoryError
from entropy_fast.ways import Microbatch

GROUPS = (2, 3, 2, 4)
KEPT = 4 * 2**30


def of_the_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")


def of_another_platform() -> None:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    )


def of_this_machine() -> None:
    torch.empty(2**62, dtype=torch.uint8)


# Without a budget there is room for one token at a time, unless a number of prompts is asked for.
WAYS = [pytest.param(0, 4, id="two sweeps"), pytest.param(KEPT, 4, id="kept"), pytest.param(KEPT, None, id="by tokens")]
OUT_OF_MEMORY = [of_the_device, of_another_platform, of_this_machine]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say how many prompts a microbatch may have; a larger one fails after part of it has been added to the gradients."""
    whole = Runner.run

    def limited(prompts: int, fail: Callable[[], None] = of_the_device, *, too_large: int | None = None) -> None:
        def run(self: Runner, microbatch: Microbatch, recorder: RowRecorder, table: SequenceTable | None) -> set[str]:
            present = microbatch.rollouts.prompt_index[microbatch.rows]
            refused = whole(self, microbatch, recorder, table)
            if len(present.unique()) > prompts or (too_large is not None and bool((present == too_large).any())):
                fail()
            return refused

        monkeypatch.setattr(Runner, "run", run)

    return limited


def probe(family: str = "qwen2", **options: object) -> tuple[OfflineEntropyProbe, Rollouts]:
    model = add_lora(build_model(family, dtype=torch.float64)).double()
    config = dict(**options)  # type: ignore[arg-type]
    return OfflineEntropyProbe(model, stepped_adamw(model), **options_of(engine="one_pass", **config)), make_rollouts(
        GROUPS
    )


def assert_same(found: DeltaH1Result, expected: DeltaH1Result) -> None:
    for name in ("diagonal", "row_sums", "column_sums", "kernel"):
        if getattr(expected, name) is not None:
            assert distance(getattr(found, name), getattr(expected, name)) < 1e-12, name
    assert found.delta_h1 == pytest.approx(expected.delta_h1, rel=1e-11)
    for side in ("entropy", "update"):
        a, b = (dict(vars(result.sequences[side])) for result in (found, expected))
        assert a.pop("ratios") is None and b.pop("ratios") is None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def reasons(result: DeltaH1Result) -> str:
    assert result.diagnostics.plan is not None
    return "; ".join(result.diagnostics.plan.reasons)


@pytest.mark.parametrize("fail", OUT_OF_MEMORY)
@pytest.mark.parametrize(("budget", "microbatch"), WAYS)
def test_the_same_kernel_in_smaller_microbatches(
    budget: int, microbatch: int | None, fail: Callable[[], None], room: Callable[..., None]
) -> None:
    runs, rollouts = probe(memory_budget=budget, prompts_per_microbatch=microbatch)
    expected = runs.compute_delta_h1(rollouts)
    assert "memory ran out" not in reasons(expected)
    room(1, fail)
    found = runs.compute_delta_h1(rollouts)
    assert_same(found, expected)
    # Four prompts in halves, and the first of these in halves again, as are all that follow; a second sweep begins with that.
    assert "memory ran out 2 time(s)" in reasons(found)
    assert found.diagnostics.plan is not None and expected.diagnostics.plan is not None
    assert (expected.diagnostics.plan.microbatches, found.diagnostics.plan.microbatches) == (1, 4)
    assert found.diagnostics.plan.largest_microbatch < expected.diagnostics.plan.largest_microbatch


@pytest.mark.parametrize(("budget", "microbatch"), WAYS)
def test_blocks_are_cut_within(budget: int, microbatch: int | None, room: Callable[..., None]) -> None:
    """A unit of two prompts is gone through one prompt at a time, and is one unit all the same."""
    runs, rollouts = probe(memory_budget=budget, blocks=2, prompts_per_microbatch=microbatch)
    expected = runs.compute_delta_h1(rollouts)
    room(1)
    found = runs.compute_delta_h1(rollouts)
    assert_same(found, expected)
    assert "microbatches were halved" in reasons(found)
    assert found.diagnostics.plan is not None and found.diagnostics.plan.microbatches == 4


def test_two_batches(room: Callable[..., None]) -> None:
    runs, rollouts = probe(memory_budget=0, prompts_per_microbatch=4)
    other = make_rollouts((3, 2, 2), seed=8)
    expected = runs.run_mixed_probe(entropy_rollouts=other, update_rollouts=rollouts)
    room(2)
    found = runs.run_mixed_probe(entropy_rollouts=other, update_rollouts=rollouts)
    assert found.delta_h1 == pytest.approx(expected.delta_h1, rel=1e-11)
    assert distance(found.row_sums, expected.row_sums) < 1e-12
    assert distance(found.column_sums, expected.column_sums) < 1e-12


def tokens_of_prompt(number: int) -> int:
    """The prompt's own tokens once, and those of its responses."""
    samples = make_samples(GROUPS)
    order = list(dict.fromkeys(sample.group for sample in samples))
    own = [sample for sample in samples if sample.group == order[number]]
    return len(own[0].prompt) + sum(len(sample.response) for sample in own)


@pytest.mark.parametrize("options", [{}, {"blocks": 2}], ids=["prompts", "blocks"])
@pytest.mark.parametrize("number", [0, 3])
def test_a_single_prompt_is_an_error(number: int, options: dict[str, object], room: Callable[..., None]) -> None:
    runs, rollouts = probe(**options)
    model = runs.context.model
    optimizer = stepped_adamw(model)
    before = take_snapshot(model, optimizer)
    room(4, too_large=number)
    with pytest.raises(ProbeMemoryError) as caught:
        runs.compute_delta_h1(rollouts)
    assert f"a single prompt of {tokens_of_prompt(number)} tokens" in caught.value.problem
    assert caught.value.problem.endswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert_unchanged(before, model, optimizer)


def test_other_errors_are_not_taken_for_it(room: Callable[..., None]) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    runs, rollouts = probe(prompts_per_microbatch=4)
    room(2, fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        runs.compute_delta_h1(rollouts)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize("batches", [1, 2])
def test_a_second_sweep_that_starts_again(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter turns out not to be capturable after some of the units were projected: none of them counts twice."""
    # All of it computes in fp64: the other way that is taken then rounds otherwise.
    runs, rollouts = probe("gpt2", memory_budget=0, prompts_per_microbatch=1)
    other = make_rollouts((3, 2, 2), seed=8)

    def run() -> DeltaH1Result:
        if batches == 1:
            return runs.compute_delta_h1(rollouts)
        return runs.run_mixed_probe(entropy_rollouts=other, update_rollouts=rollouts)

    expected, whole, seen = run(), Runner.run, []

    def late(self: Runner, microbatch: Microbatch, recorder: RowRecorder, table: SequenceTable | None) -> set[str]:
        refused = whole(self, microbatch, recorder, table)
        if table is None and not self.left_out:
            seen.append(microbatch)
            if len(seen) == 3:
                return {runs.context.registry.names[0]}
        return refused

    monkeypatch.setattr(Runner, "run", late)
    with pytest.warns(EntropyFastWarning, match="trainable parameters are used in ways"):
        found = run()
    assert len(seen) == 3
    assert found.delta_h1 == pytest.approx(expected.delta_h1, rel=1e-10)
    for name in ("diagonal", "row_sums", "column_sums"):
        if getattr(expected, name) is not None:
            assert distance(getattr(found, name), getattr(expected, name)) < 1e-10, name
    a, b = (torch.tensor(list(result.by_parameter.values())) for result in (found, expected))
    assert distance(a, b) < 1e-10
