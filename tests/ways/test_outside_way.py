"""A way that the package does not know, registered from outside of it."""

from __future__ import annotations

import pytest
import torch
from engine_sums import assert_same_estimate, assert_same_sums, observe
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_rollouts

from entropy_fast.capture import RowRecorder
from entropy_fast.ways import Microbatch, Passed, Trial, choice, register_way
from entropy_fast.ways.padded import LogitsWay


class EvenGroups(LogitsWay):
    """The model's own logits, for batches whose prompts all have as many responses."""

    name = "even groups"
    ran = 0

    def __str__(self) -> str:
        return "even groups by their logits"

    def why_not(self, trial: Trial) -> str | None:
        counts = torch.bincount(trial.rollouts.prompt_index)
        return None if int(counts.min()) == int(counts.max()) else "its groups are uneven"

    def run(self, microbatch: Microbatch, recorder: RowRecorder) -> Passed:
        type(self).ran += 1
        return super().run(microbatch, recorder)


def test_a_way_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_KINDS", list(choice._KINDS))
    assert register_way(EvenGroups) is EvenGroups
    model = add_lora(build_model("gpt2", dtype=torch.float64)).double()
    optimizer = stepped_adamw(model)
    uneven, even = make_rollouts((2, 3, 2)), make_rollouts((3, 3, 3))
    other = observe("one_pass", model, optimizer, uneven)
    assert EvenGroups.ran == 0
    assert other.result.plan.way.startswith("packed")
    assert other.result.plan.not_taken == ("even groups: its groups are uneven",)
    found = observe("one_pass", model, optimizer, even)
    assert EvenGroups.ran > 0
    assert found.result.plan.way == "even groups by their logits"
    assert found.result.plan.not_taken == ()
    expected = observe("two_pass", model, optimizer, even)
    assert_same_sums(found, expected, 1e-10)
    assert_same_estimate(found, expected, 1e-10)
