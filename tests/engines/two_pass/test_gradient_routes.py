"""LoRA under reentrant checkpointing: ``torch.autograd.grad`` sees nothing, ``backward()`` everything.

A probe that took its update gradient by the first once printed an exact zero.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from probe_models.architectures import disable_checkpointing, enable_checkpointing
from probe_models.batches import make_rollouts
from probe_models.cases import Case, components_of, estimate_of, lora_case, mute_adapters
from probe_models.oracle import kernel_by_definition
from torch import Tensor

from entropy_fast.errors import GradientCoverageError, GraphDetachedError


@pytest.fixture
def case() -> Case:
    case = lora_case()
    enable_checkpointing(case.model, reentrant=True)
    case.model.train()
    return case


def loss_of(case: Case) -> Tensor:
    rollouts = case.rollouts
    logits = case.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask, use_cache=False).logits
    loss: Tensor = torch.log_softmax(logits, -1)[..., 0].sum()
    return loss


def test_what_torch_does(case: Case) -> None:
    """Not a test of this package: the behaviour everything below is about. It would be good news if it failed."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    try:
        gradients = torch.autograd.grad(loss_of(case), parameters, allow_unused=True)
    except RuntimeError as error:
        assert "checkpoint" in str(error)  # noqa: PT017 (either behaviour is the bug)
    else:
        assert [g for g in gradients if g is not None] == []
    loss_of(case).backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)


def test_backward_gives_what_no_checkpointing_gives(case: Case) -> None:
    with_checkpointing = case.probe(full_kernel=True).compute_delta_h1(case.rollouts)
    disable_checkpointing(case.model)
    plain = case.probe(full_kernel=True).compute_delta_h1(case.rollouts)
    by_definition = kernel_by_definition(case.model, case.optimizer, case.samples)
    scale = float(by_definition.matrix.abs().max())
    for result in (with_checkpointing, plain):
        assert result.kernel is not None
        torch.testing.assert_close(result.kernel, by_definition.matrix, rtol=0, atol=1e-5 * scale)
        assert result.delta_h1 == pytest.approx(
            by_definition.same_batch, abs=1e-5 * scale * by_definition.learning_rate
        )
    assert abs(by_definition.same_batch) > 1e-3 * scale * by_definition.learning_rate  # and it is not a zero


@pytest.mark.parametrize("batches", [1, 2])
def test_autograd_grad_explains_itself(case: Case, batches: int) -> None:
    probe = case.probe(y_pass="autograd_grad")
    n = sum(p.requires_grad for p in case.model.parameters())
    other = [make_rollouts((2, 2), seed=9)] if batches == 2 else []
    with pytest.raises((GradientCoverageError, GraphDetachedError)) as caught:
        estimate_of(probe, *other, case.rollouts)
    message = str(caught.value)
    assert f"None for all {n} trainable parameters" in message
    assert f"X pass: {n} parameters" in message
    assert "torch.float32 on cpu" in message
    assert f"S.sum().backward() fills {n}" in message
    assert "reentrant" in message
    assert 'y_pass="backward"' in caught.value.fix


def test_autograd_grad_says_so_when_there_was_no_x_pass(case: Case) -> None:
    with pytest.raises(GradientCoverageError, match="X pass: not run"):
        components_of(case.probe(y_pass="autograd_grad")).accumulate_sum_Y(case.rollouts)


def test_autograd_grad_refuses_when_nothing_has_a_gradient(case: Case) -> None:
    """Neither route reaches a parameter: the blame is not put on checkpointing."""
    disable_checkpointing(case.model)
    components = components_of(case.probe(y_pass="autograd_grad"))
    mute_adapters(case.model)
    with pytest.raises(GradientCoverageError, match=r"fills 0.*does not reach the parameters at all"):
        components.accumulate_sum_Y(case.rollouts)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "non_reentrant"])
def test_both_routes_agree_where_both_work(checkpointing: bool) -> None:
    case = lora_case("gpt2")
    if checkpointing:
        enable_checkpointing(case.model, reentrant=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one = case.probe(y_pass="backward").compute_delta_h1(case.rollouts)
        other = case.probe(y_pass="autograd_grad", strict=True).compute_delta_h1(case.rollouts)
    assert other.delta_h1 == one.delta_h1
    assert torch.equal(other.column_sums, one.column_sums)


def test_gradients_left_by_training_do_not_leak_into_the_sums() -> None:
    case = lora_case()
    expected = case.probe().compute_delta_h1(case.rollouts)
    for parameter in case.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e6)
    found = case.probe().compute_delta_h1(case.rollouts)
    assert found.delta_h1 == expected.delta_h1
    assert torch.equal(found.row_sums, expected.row_sums)
