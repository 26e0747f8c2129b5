"""Graphs that are cut, temperatures that do not matter, microbatches that change nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_models.architectures import add_lora, build_model
from probe_models.batches import make_rollouts
from probe_models.cases import Case, case_of, components_of, lora_case
from torch import Tensor

from entropy_fast import ProbeComponents
from entropy_fast.columns.functional import usual_functionals
from entropy_fast.engines.two_pass import engine as two_pass_engine
from entropy_fast.errors import EntropyFastWarning, GraphDetachedError, RolloutsError
from entropy_fast.step import AdamState
from entropy_fast.ways.teacher_forcing import ForwardResult, PaddedBatch, align_logprobs, model_logits


def both_estimates(case: Case) -> list[Callable[[], object]]:
    probe = case.probe()
    other = make_rollouts((2, 2), seed=9)
    return [
        lambda: probe.compute_delta_h1(case.rollouts),
        lambda: probe.run_mixed_probe(entropy_rollouts=other, update_rollouts=case.rollouts),
        lambda: components_of(probe).compute_conditional_variance_over_E_alpha(other, [torch.zeros(())]),
    ]


def test_a_forward_under_no_grad_is_found_out() -> None:
    case = lora_case()
    base = case.model.get_base_model()
    base.model.forward = torch.no_grad()(base.model.forward)
    for estimate in both_estimates(case):
        with pytest.raises(GraphDetachedError, match="logits") as caught:
            estimate()
        assert "_teacher_force_logprobs" in str(caught.value)
        assert "requires_grad=False" in str(caught.value)
        for cause in ("no_grad", "inference_mode", "detach()", "disable_adapter()", "enable_input_require_grads()"):
            assert cause in caught.value.fix


def test_detached_logits_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = lora_case()
    monkeypatch.setattr(two_pass_engine, "model_logits", lambda *arguments: model_logits(*arguments).detach())
    for estimate in both_estimates(case):
        with pytest.raises(GraphDetachedError, match=r"_teacher_force_logprobs: logits .*float32 on cpu"):
            estimate()


def test_logits_that_are_leaves_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """requires_grad alone proves nothing: a detached tensor on which it was set again has no graph."""
    case = lora_case()
    monkeypatch.setattr(
        two_pass_engine, "model_logits", lambda *arguments: model_logits(*arguments).detach().requires_grad_(True)
    )
    with pytest.raises(GraphDetachedError, match="grad_fn=None"):
        case.probe().compute_delta_h1(case.rollouts)


def test_log_probs_detached_from_the_logits_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = lora_case()

    def cut(logits: Tensor, batch: PaddedBatch, **options: bool) -> ForwardResult:
        whole = align_logprobs(logits, batch, **options)
        return dataclasses.replace(whole, sequence_logprobs=whole.sequence_logprobs.detach())

    monkeypatch.setattr(two_pass_engine, "align_logprobs", cut)
    for estimate in both_estimates(case):
        with pytest.raises(GraphDetachedError, match="_teacher_force_logprobs: S "):
            estimate()


def test_reentrant_checkpointing_over_frozen_embeddings_says_what_to_call() -> None:
    case = lora_case()
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    case.model.get_base_model().disable_input_require_grads()  # switched on for us by recent transformers
    with pytest.raises(GraphDetachedError, match=r"enable_input_require_grads\(\)"):
        case.probe().compute_delta_h1(case.rollouts)


def test_nan_log_probs_are_refused() -> None:
    case = lora_case()
    with torch.no_grad():
        next(p for n, p in case.model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(GraphDetachedError, match="NaN"):
        case.probe().compute_delta_h1(case.rollouts)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.3, 1.0), (1.7, 1.0), (None, None), (1.0, None)])
def test_the_sampling_temperature_is_reported_and_never_used(temperature: float | None, top_p: float | None) -> None:
    case = lora_case()
    probe = case.probe()
    expected = probe.compute_delta_h1(make_rollouts())
    scored = {label: table.sequence_logprobs for label, table in expected.sequences.items()}
    assert not any("temperature" in note for note in expected.diagnostics.warnings)
    odd = make_rollouts(temperature=temperature, top_p=top_p)
    with pytest.warns(EntropyFastWarning, match="temperature"):
        found = probe.compute_delta_h1(odd)
    for label, values in scored.items():
        assert torch.equal(found.sequences[label].sequence_logprobs, values)
    assert found.delta_h1 == expected.delta_h1
    assert found.std_error == expected.std_error
    (note,) = [note for note in found.diagnostics.warnings if "temperature" in note]
    assert ("unknown" in note) == (temperature is None or top_p is None)
    assert found.diagnostics.sampling == {"rollouts": (temperature, top_p)}


@pytest.mark.parametrize(
    ("cut", "named"),
    [
        ({"top_p": 0.9}, "top-p 0.9"),
        ({"top_k": 50}, "top-k 50"),
        ({"min_p": 0.1}, "min-p 0.1"),
        ({"top_p": 0.9, "top_k": 2, "min_p": 0.5}, "top-p 0.9, top-k 2, min-p 0.5"),
        ({"temperature": None, "top_k": 2}, "top-k 2"),
    ],
)
def test_a_truncated_sampler_leaves_the_direct_part_alone(cut: dict[str, Any], named: str) -> None:
    """How often prefixes are visited is then another policy's business, whose entropy is another quantity."""
    case, odd = lora_case(), make_rollouts(**cut)
    with pytest.raises(RolloutsError, match=rf"sampled with {re.escape(named)}\. .*another quantity") as caught:
        case.probe().compute_delta_h1(odd)
    assert "parts=('direct',)" in caught.value.fix
    with pytest.warns(EntropyFastWarning, match="the direct part is about the prefixes that were visited so"):
        found = case.probe(entropy_estimator="rao_blackwell", parts=("direct",)).compute_delta_h1(odd)
    expected = case.probe(entropy_estimator="rao_blackwell", parts=("direct",)).compute_delta_h1(make_rollouts())
    assert found.split.direct.value == expected.split.direct.value
    (note,) = [note for note in found.diagnostics.warnings if "the direct part is about" in note]
    assert named in note
    assert found.diagnostics.sampling == {"rollouts": (odd.temperature, odd.top_p)}
    assert found.diagnostics.truncation == {"rollouts": (cut.get("top_k"), cut.get("min_p"))}
    assert not usual_functionals(odd)


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_k": -1}, {"min_p": 0.0}, {"top_k": None, "min_p": None}])
def test_a_sampler_that_cuts_nothing_is_no_news(off: dict[str, Any]) -> None:
    case = lora_case()
    found, expected = (case.probe().compute_delta_h1(rollouts) for rollouts in (make_rollouts(**off), make_rollouts()))
    assert found.delta_h1 == expected.delta_h1
    assert found.diagnostics.warnings == expected.diagnostics.warnings
    assert usual_functionals(make_rollouts(**off))


def test_two_batches_report_the_sampling_of_each() -> None:
    case = lora_case()
    hot = make_rollouts((2, 2), seed=9, temperature=1.5)
    with pytest.warns(EntropyFastWarning, match="entropy: sampled at temperature 1.5"):
        found = case.probe().run_mixed_probe(entropy_rollouts=hot, update_rollouts=case.rollouts)
    assert found.diagnostics.sampling == {"entropy": (1.5, 1.0), "update": (1.0, 1.0)}
    assert sum("temperature" in note for note in found.diagnostics.warnings) == 1
    cool = case.probe().run_mixed_probe(entropy_rollouts=make_rollouts((2, 2), seed=9), update_rollouts=case.rollouts)
    assert (found.delta_h1, found.std_error) == (cool.delta_h1, cool.std_error)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_microbatches_of_any_size_give_the_same_sums(lora: bool) -> None:
    sizes = (2, 3, 2, 4, 2)
    model = build_model("gpt2")
    case = case_of(add_lora(model) if lora else model, sizes)
    one = case.probe(prompts_per_microbatch=1).compute_delta_h1(case.rollouts)
    scale = float(one.row_sums.abs().max())
    for size in (2, 3, 5, 100):
        several = case.probe(prompts_per_microbatch=size).compute_delta_h1(case.rollouts)
        for field in ("row_sums", "column_sums", "diagonal"):
            torch.testing.assert_close(getattr(several, field), getattr(one, field), rtol=1e-5, atol=1e-5 * scale)
        assert several.x_dot_y == pytest.approx(one.x_dot_y, abs=1e-5 * scale)
        for side in ("entropy", "update"):
            left, right = several.sequences[side], one.sequences[side]
            torch.testing.assert_close(left.sequence_logprobs, right.sequence_logprobs, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(left.coefficients[side], right.coefficients[side], rtol=1e-5, atol=1e-6)


def test_sums_kept_on_the_cpu_are_the_same_bits() -> None:
    case = lora_case()
    on_device = case.probe().compute_delta_h1(case.rollouts)
    on_cpu = case.probe(accumulate_on="cpu").compute_delta_h1(case.rollouts)
    assert on_cpu.delta_h1 == on_device.delta_h1
    assert torch.equal(on_cpu.row_sums, on_device.row_sums)


def test_progress_covers_every_pass_and_every_prompt() -> None:
    case = lora_case()
    seen: list[tuple[str, int, int]] = []
    components = ProbeComponents(
        case.model,
        AdamState.from_optimizer(case.optimizer, case.model),
        on_progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    components._compute_delta_h1_exact(case.rollouts)
    n = case.rollouts.n_prompts
    for stage in ("entropy", "update", "diagonal"):
        assert [(done, total) for name, done, total in seen if name == stage] == [(k + 1, n) for k in range(n)]
