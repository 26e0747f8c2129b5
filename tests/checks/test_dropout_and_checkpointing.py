"""During a probe dropout is off everywhere and gradient checkpointing stays on where it was switched on."""

from __future__ import annotations

import functools

import pytest
import torch
from probe_models.architectures import add_lora, build_model, disable_checkpointing, enable_checkpointing
from probe_models.batches import make_rollouts
from probe_models.cases import Case, case_of, lora_case
from torch import nn
from torch.utils.checkpoint import checkpoint

from entropy_fast.checks.model_state import checkpointed_modules, probe_state, reentrant_checkpointing

CHECKPOINTING = {"none": None, "reentrant": True, "non_reentrant": False}


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize(("family", "lora"), [("qwen2", True), ("gpt2", False), ("opt", True)])
def test_dropout_is_off(family: str, kind: str, lora: bool) -> None:
    """The same weights with and without dropout in the config (attention, hidden, LoRA, OPT's layerdrop) agree."""

    def build(dropout: float) -> Case:
        model: nn.Module = build_model(family, dropout=dropout)
        if lora:
            model = add_lora(model, dropout=dropout)
        if CHECKPOINTING[kind] is not None:
            enable_checkpointing(model, reentrant=CHECKPOINTING[kind])
        return case_of(model.train())

    without, with_dropout = build(0.0), build(0.5)
    for (name, p), (_, q) in zip(without.model.named_parameters(), with_dropout.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    expected = without.probe().compute_delta_h1(without.rollouts)
    for flags in (True, False):
        with_dropout.model.train(flags)
        torch.manual_seed(int(flags))
        found = with_dropout.probe().compute_delta_h1(with_dropout.rollouts)
        assert torch.equal(
            found.sequences["entropy"].sequence_logprobs, expected.sequences["entropy"].sequence_logprobs
        )
        size = float(expected.row_sums.abs().max())
        torch.testing.assert_close(found.row_sums, expected.row_sums, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activations_are_recomputed(family: str, kind: str, training: bool) -> None:
    """A layer's forward runs twice per pass, also when the user's model is in eval() (transformers alone would not)."""
    case = lora_case(family)
    attention = next(m for n, m in case.model.named_modules() if n.endswith((".0.self_attn", ".0.attn")))
    calls = 0

    def count(module: nn.Module, arguments: object) -> None:
        nonlocal calls
        calls += 1

    attention.register_forward_pre_hook(count)
    case.model.train(training)
    case.probe().compute_delta_h1(case.rollouts)
    plain = calls
    calls = 0
    enable_checkpointing(case.model, reentrant=CHECKPOINTING[kind])
    case.model.train(training)
    case.probe().compute_delta_h1(case.rollouts)
    # Forwards: X and Y pass and X and Y of every unit, one microbatch a prompt.
    assert plain == 4 * case.rollouts.n_prompts
    assert calls == 2 * plain


def test_flags_inside_the_context() -> None:
    case = lora_case("opt", dropout=0.4)
    enable_checkpointing(case.model, reentrant=False)
    case.model.train()
    checkpointed = {name for name, _ in checkpointed_modules(case.model)}
    assert any(name.endswith("layers.0") for name in checkpointed)
    with probe_state(case.model):
        for name, module in case.model.named_modules():
            assert module.training == (name in checkpointed), name
            if module.training:
                assert all(getattr(module, mark, 0.0) == 0.0 for mark in ("dropout", "layerdrop")), name
    assert all(module.training for module in case.model.modules())


def test_reentrant_mode_is_recognised() -> None:
    model = build_model()
    assert reentrant_checkpointing(model) is None
    enable_checkpointing(model, reentrant=False)
    assert reentrant_checkpointing(model) is None
    enable_checkpointing(model, reentrant=True)
    assert reentrant_checkpointing(model) == "model"
    disable_checkpointing(model)
    assert reentrant_checkpointing(model) is None
    # Passed to torch without a choice, torch itself chooses reentrant.
    enable_checkpointing(model, reentrant=False)
    for _, module in checkpointed_modules(model):
        module._gradient_checkpointing_func = functools.partial(checkpoint, preserve_rng_state=False)
    assert reentrant_checkpointing(model) == "model"


def test_checkpointing_does_not_change_the_number() -> None:
    results = []
    for reentrant in CHECKPOINTING.values():
        case = lora_case("opt")
        if reentrant is not None:
            enable_checkpointing(case.model, reentrant=reentrant)
        results.append(case.probe().compute_delta_h1(make_rollouts()))
    for other in results[1:]:
        assert other.delta_h1 == pytest.approx(results[0].delta_h1, rel=1e-4)
        torch.testing.assert_close(other.row_sums, results[0].row_sums, rtol=1e-5, atol=1e-4)
