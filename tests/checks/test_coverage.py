"""What the pass of either side reached: the counts are right, and nothing reached is an error that names the cause."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from probe_models.architectures import add_lora, build_model, enable_checkpointing
from probe_models.batches import make_samples, pack
from probe_models.cases import Case, case_of, components_of, lora_case, mute_adapters
from probe_models.oracle import kernel_by_definition
from torch import nn

from entropy_fast.checks.coverage import PassCoverage, coverage_difference
from entropy_fast.errors import EntropyFastWarning, GradientCoverageError, GraphDetachedError, RolloutsError

UNUSED = 5  # elements of a parameter that no forward uses


def case_with_unused_parameter() -> Case:
    model = add_lora(build_model())
    model.register_parameter("unused", nn.Parameter(torch.ones(UNUSED)))
    return case_of(model)


def case_with_reentrant_checkpointing_and_trainable_head() -> Case:
    """autograd.grad sees the head alone, backward sees everything."""
    model = add_lora(build_model())
    model.get_output_embeddings().weight.requires_grad_(True)
    enable_checkpointing(model, reentrant=True)
    return case_of(model)


def test_diagnostics_hold_the_counts_that_can_be_counted_by_hand() -> None:
    case = case_with_unused_parameter()
    result = case.probe().compute_delta_h1(case.rollouts)
    kernel = kernel_by_definition(case.model, case.optimizer, case.samples)
    named = [(name, p) for name, p in case.model.named_parameters() if p.requires_grad]
    total = sum(p.numel() for _, p in named)
    mean_length = sum(len(s.response) for s in case.samples) / len(case.samples)
    x_sum = [sum(parts) for parts in zip(*kernel.x_gradients, strict=True)]
    g_sum = [sum(parts) for parts in zip(*kernel.g_gradients, strict=True)]
    for side, summed in (("entropy", x_sum), ("update", g_sum)):
        found = result.diagnostics.coverage[side]
        assert found.side == side
        assert found.n_trainable == len(named)
        assert found.n_with_gradient == len(named) - 1
        assert found.untouched == ("unused",)
        assert found.numel_share == pytest.approx((total - UNUSED) / total, rel=1e-12)
        assert found.norm == pytest.approx(math.sqrt(sum(float(t.square().sum()) for t in summed)), rel=1e-5)
        assert found.mean_response_length == pytest.approx(mean_length, rel=1e-12)
    group = case.optimizer.param_groups[0]
    products = {}
    for (name, parameter), x, g in zip(named, x_sum, g_sum, strict=True):
        state = case.optimizer.state[parameter]
        corrected = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
        products[name] = float((x * g / (corrected.sqrt() + group["eps"])).sum())
    first = list(products)[:5]
    assert list(result.diagnostics.leading_products) == first
    scale = max(abs(value) for value in products.values())
    for name in first:
        assert result.diagnostics.leading_products[name] == pytest.approx(products[name], abs=1e-5 * scale)
    assert result.x_dot_y == pytest.approx(sum(products.values()), abs=1e-5 * scale)


def test_two_batches_are_counted_each_on_its_own() -> None:
    case = lora_case()
    update = make_samples((2, 2), seed=21)
    result = case.probe().run_mixed_probe(entropy_rollouts=case.rollouts, update_rollouts=pack(update))
    for side, samples in (("entropy", case.samples), ("update", update)):
        mean_length = sum(len(s.response) for s in samples) / len(samples)
        assert result.diagnostics.coverage[side].mean_response_length == pytest.approx(mean_length)
        assert result.sequences[side].sequence_logprobs.shape == (len(samples),)
    assert result.diagnostics.coverage["entropy"].norm != result.diagnostics.coverage["update"].norm


def test_an_untouched_parameter_is_an_error_when_strict() -> None:
    case = case_with_unused_parameter()
    with pytest.raises(GradientCoverageError, match="strict") as caught:
        case.probe(strict=True).compute_delta_h1(case.rollouts)
    assert "'unused'" in str(caught.value)
    complete = lora_case()
    strict = complete.probe(strict=True).compute_delta_h1(complete.rollouts)
    assert strict.delta_h1 == complete.probe().compute_delta_h1(complete.rollouts).delta_h1


def test_strict_autograd_grad_lets_torch_name_the_trouble() -> None:
    case = case_with_reentrant_checkpointing_and_trainable_head()
    with pytest.raises(GraphDetachedError, match="appears to not have been used in the graph"):
        case.probe(strict=True, y_pass="autograd_grad").compute_delta_h1(case.rollouts)


def test_passes_that_reach_different_parameters_are_warned_about_with_both_counts() -> None:
    case = case_with_reentrant_checkpointing_and_trainable_head()
    n = sum(p.requires_grad for p in case.model.parameters())
    message = f"entropy pass reached {n} and the update pass 1 of {n}"
    with pytest.warns(EntropyFastWarning, match=message):
        result = case.probe(y_pass="autograd_grad").compute_delta_h1(case.rollouts)
    assert any(message in note for note in result.diagnostics.warnings)
    assert result.diagnostics.coverage["entropy"].n_with_gradient == n
    assert result.diagnostics.coverage["update"].n_with_gradient == 1
    with pytest.warns(EntropyFastWarning, match=message):
        case.probe(y_pass="autograd_grad").run_mixed_probe(
            entropy_rollouts=case.rollouts, update_rollouts=pack(make_samples((2, 2), seed=21))
        )


def test_equal_counts_of_different_parameters_differ_too() -> None:
    left = PassCoverage("entropy", 3, 2, 0.5, 1.0, ("a",), 4.0)
    assert coverage_difference(left, dataclasses.replace(left, side="update")) is None
    assert coverage_difference(left, dataclasses.replace(left, side="update", untouched=("b",))) is not None
    one = dataclasses.replace(left, norm=None, one_prompt=True)
    assert coverage_difference(one, dataclasses.replace(left, side="update", untouched=("b",))) is None


def test_no_parameter_reached_names_an_inactive_adapter() -> None:
    case = lora_case()
    case.model.enable_input_require_grads()  # the logits hang on the embeddings' output, and on no parameter
    probe = case.probe()
    mute_adapters(case.model)
    with pytest.raises(GradientCoverageError, match="adapter") as caught:
        probe.compute_delta_h1(case.rollouts)
    n = sum(p.requires_grad for p in case.model.parameters())
    assert f"entropy pass: none of the {n} trainable parameters" in str(caught.value)
    with pytest.raises(GradientCoverageError, match="update pass: none"):
        components_of(probe).accumulate_sum_Y(case.rollouts)


def test_no_parameter_reached_names_reentrant_checkpointing() -> None:
    case = lora_case()
    enable_checkpointing(case.model, reentrant=True)
    case.model.get_base_model().disable_input_require_grads()

    def attach(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(a.detach().requires_grad_(True) for a in arguments)

    case.model.get_output_embeddings().register_forward_pre_hook(attach)
    with pytest.raises(GradientCoverageError, match="reentrant") as caught:
        case.probe().compute_delta_h1(case.rollouts)
    assert "enable_input_require_grads" in str(caught.value)


def with_empty_rows(case: Case, empty: list[int]) -> Case:
    loss_mask = case.rollouts.loss_mask.clone()
    loss_mask[empty] = 0
    return dataclasses.replace(case, rollouts=dataclasses.replace(case.rollouts, loss_mask=loss_mask))


def test_empty_responses_are_left_out_counted_and_reported() -> None:
    whole = lora_case(group_sizes=(3, 3, 2))
    last_group = [i for i, s in enumerate(whole.samples) if s.group == whole.samples[0].group]
    gone = [next(i for i in range(len(whole.samples)) if i not in last_group), *last_group]
    case = with_empty_rows(whole, sorted(gone))
    with pytest.warns(EntropyFastWarning, match=f"{len(gone)} sequence.* without response tokens"):
        result = case.probe(full_kernel=True).compute_delta_h1(case.rollouts)
    remaining = [s for i, s in enumerate(case.samples) if i not in gone]
    expected = kernel_by_definition(case.model, case.optimizer, remaining)
    assert result.kernel is not None
    torch.testing.assert_close(
        result.kernel, expected.matrix, rtol=1e-4, atol=1e-5 * float(expected.matrix.abs().max())
    )
    report = result.diagnostics.empty_responses["rollouts"]
    assert report.sequences == tuple(sorted(gone))
    assert report.groups == (whole.samples[0].group,)
    assert any("left out" in note for note in result.diagnostics.warnings)
    kept_lengths = [len(s.response) for s in remaining]
    assert result.diagnostics.coverage["entropy"].mean_response_length == pytest.approx(
        sum(kept_lengths) / len(kept_lengths)
    )
    assert sum(p.n_responses for p in result.per_prompt) == len(remaining)


def test_only_empty_responses_are_an_error() -> None:
    whole = lora_case()
    case = with_empty_rows(whole, list(range(len(whole.samples))))
    with pytest.raises(RolloutsError, match="empty response region"):
        case.probe().compute_delta_h1(case.rollouts)
    with pytest.raises(RolloutsError, match="empty response region"):
        case.probe().run_mixed_probe(entropy_rollouts=whole.rollouts, update_rollouts=case.rollouts)
