"""Prompts in the row of their responses or apart: the same sums and the same kernel, and those of the two-pass engine."""

from __future__ import annotations

import pytest
import torch
from engine_sums import Observed, assert_same_estimate, assert_same_sums, observe
from exactness import batch_of
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.own_dtype import computing_in_own_dtype

from entropy_fast.ways.packed import passes

WAYS = {"in one row": 10**9, "apart": 0}
# Full attention, a window, scores bent by a softcap (which the compiled kernel does not take), and learned positions.
FAMILIES = ("qwen2", "mistral", "gemma2", "gpt2")


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every packed forward from now on."""
    seen: list[int] = []
    plain = passes.PackedPass._decode

    def decode(self: passes.PackedPass, ids: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(ids.shape[1])
        return plain(self, ids, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(passes.PackedPass, "_decode", decode)
    return seen


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full, tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_are_exact(family: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(family, dtype=torch.float64, tied=not lora)
    if lora:
        model = add_lora(model).double()
    optimizer = stepped_adamw(model)
    found: dict[str, Observed] = {}
    n_forwards = {}
    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, batch_of("uneven groups"))
        for way, most in WAYS.items():
            monkeypatch.setattr(passes, "_MOST_COPIED", most)
            with monkeypatch.context() as context:
                seen = forwards(context)
                found[way] = observe("one_pass", model, optimizer, batch_of("uneven groups"))
            n_forwards[way] = len(seen)
    # A trial, and for every microbatch one forward or two.
    assert 2 * (n_forwards["in one row"] - 1) == n_forwards["apart"] - 1
    for one in found.values():
        assert_same_sums(one, expected, 1e-10)
        assert_same_estimate(one, expected, 1e-10)


def test_a_prompt_whose_coefficients_are_all_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal advantages: nothing goes back with a, and no scale is taken of zeros."""
    model = add_lora(build_model("qwen2", dtype=torch.float64)).double()
    optimizer = stepped_adamw(model)
    rollouts = batch_of("uneven groups")
    rollouts.advantages[rollouts.rows_of_prompt(1)] = 0.0
    with computing_in_own_dtype(model):
        expected = observe("two_pass", model, optimizer, rollouts)
        for most in WAYS.values():
            monkeypatch.setattr(passes, "_MOST_COPIED", most)
            one = observe("one_pass", model, optimizer, rollouts)
            assert_same_sums(one, expected, 1e-10)
            assert_same_estimate(one, expected, 1e-10)
