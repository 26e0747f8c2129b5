"""P against the steps torch.optim.Adam really takes, and what is left out where P is not defined.

Legend: P g = (lr_group / lr) · g / (sqrt(v / (1 - β2^step)) + ε), v the stored second moment, lr the first group's rate.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from probe_oracle.models import stepped_adam
from torch import Tensor, nn

from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import GradientCoverageError, LearningRateError, OptimizerStateError
from entropy_fast.step import AdamPreconditioner, AdamState
from entropy_fast.step.preconditioner import check_excluded

KINDS = [torch.optim.Adam, torch.optim.AdamW]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).double()


def gradients_of(model: nn.Module, seed: int = 5, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


def preconditioner_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float | None = None
) -> AdamPreconditioner:
    state = AdamState.from_optimizer(optimizer, model)
    return AdamPreconditioner(state, ParameterRegistry.build(model, state.group_of), learning_rate)


def step_of_torch(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> list[Tensor]:
    """θ_before - θ_after of a step torch takes with P frozen: β1 = 0, θ = 0, and v and step such that the step makes them
    what the optimizer holds now."""
    model, optimizer = copy.deepcopy((model, optimizer))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        with torch.no_grad():
            parameter.zero_()  # weight decay has nothing to act on, and the difference below is exact
        parameter.grad = gradient.clone()
    for group in optimizer.param_groups:
        beta2 = group["betas"][1]
        group["betas"] = (0.0, beta2)
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # step() computes β2 v + (1 - β2) g² and counts one up; undo both beforehand.
            state["exp_avg_sq"].sub_((1 - beta2) * parameter.grad.square()).div_(beta2)
            state["step"] -= 1
    optimizer.step()
    return [-p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_preconditioned_gradient_is_the_step_torch_takes(kind: type[torch.optim.Adam], scale: float) -> None:
    model = small_model()
    optimizer = stepped_adam(model, kind=kind)  # three groups that differ in lr, betas, eps and AMSGrad
    gradients = gradients_of(model, scale=scale)
    before = copy.deepcopy(optimizer.state_dict())
    found = preconditioner_of(model, optimizer).apply_preconditioner(gradients)
    for piece, step in zip(found, step_of_torch(model, optimizer, gradients), strict=True):
        torch.testing.assert_close(1e-3 * piece, step, rtol=1e-10, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)  # nothing was changed by looking


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_after_the_first_step_p_times_its_gradient_is_that_step(
    kind: type[torch.optim.Adam], amsgrad: bool, eps: float
) -> None:
    """Where m̂ = g and v̂ = g², no trick is needed: bias correction and the place of ε have to be right."""
    model = small_model()
    optimizer = kind(model.parameters(), lr=0.1, eps=eps, betas=(0.9, 0.97), weight_decay=0.0, amsgrad=amsgrad)
    gradients = gradients_of(model)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    found = preconditioner_of(model, optimizer).apply_preconditioner(gradients)
    for old, parameter, piece in zip(before, model.parameters(), found, strict=True):
        torch.testing.assert_close(0.1 * piece, old - parameter.detach(), rtol=1e-9, atol=1e-14)


def test_amsgrad_uses_the_maximum_and_not_the_present_moment() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.5), eps=1e-12, amsgrad=True)
    for size in (8.0, 0.1, 0.1, 0.1):
        model.weight.grad = torch.full((1, 2), size, dtype=torch.float64)
        optimizer.step()
    (piece,) = preconditioner_of(model, optimizer).apply_preconditioner([torch.ones(1, 2).double()])
    largest = 0.5 * 8.0**2
    assert piece.tolist()[0] == pytest.approx([1 / math.sqrt(largest / (1 - 0.5**4))] * 2)


def test_half_precision_gradients_keep_their_dtype_and_single_precision_moments_are_widened() -> None:
    model = small_model().to(torch.bfloat16)
    optimizer = stepped_adam(model)
    gradients = [g.float() for g in gradients_of(model)]
    found = preconditioner_of(model, optimizer).apply_preconditioner(gradients)
    assert [piece.dtype for piece in found] == [torch.float32] * len(gradients)
    group = optimizer.param_groups[0]
    state = optimizer.state[group["params"][0]]
    root = (state["exp_avg_sq"].double() / (1 - 0.99 ** float(state["step"]))).sqrt()
    torch.testing.assert_close(found[0].double(), gradients[0].double() / (root + 1e-8), rtol=1e-5, atol=1e-7)


def test_an_explicit_rate_replaces_the_first_groups_and_keeps_the_ratios() -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    gradients = gradients_of(model)
    own, given = preconditioner_of(model, optimizer), preconditioner_of(model, optimizer, learning_rate=0.7)
    assert (own.learning_rate, given.learning_rate) == (1e-3, 0.7)
    for one, two in zip(own.apply_preconditioner(gradients), given.apply_preconditioner(gradients), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan, math.inf])
def test_rates_that_cannot_be_used_are_refused(rate: float) -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    with pytest.raises(LearningRateError, match="the given value is"):
        preconditioner_of(model, optimizer, learning_rate=rate)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with pytest.raises(LearningRateError, match="the optimizer's first group has"):
        preconditioner_of(model, optimizer)


def test_a_scheduler_at_zero_can_be_overruled_by_an_explicit_rate() -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    gradients = gradients_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    expected = preconditioner_of(model, optimizer).apply_preconditioner(gradients)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    found = preconditioner_of(model, optimizer, learning_rate=1e-3).apply_preconditioner(gradients)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    optimizer.param_groups[1]["lr"] = 1e-3  # and now there is no ratio to the first
    with pytest.raises(LearningRateError, match="the first is 0 and others are not"):
        preconditioner_of(model, optimizer, learning_rate=1e-3)


def test_a_group_with_rate_zero_among_others_does_not_move_and_is_not_missing() -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    optimizer.param_groups[1]["lr"] = 0.0
    gradients = gradients_of(model)
    preconditioner = preconditioner_of(model, optimizer)
    found = preconditioner.apply_preconditioner(gradients)
    for index, piece in enumerate(found):
        assert bool((piece == 0).all()) == (index % 3 == 1)
    excluded = preconditioner.excluded(gradients)
    assert (excluded.zero_moment, excluded.without_state, excluded.not_in_optimizer, excluded.share) == (0, 0, 0, 0.0)


def test_elements_without_a_second_moment_are_zero_in_y_and_counted_with_their_share() -> None:
    model = small_model()
    embedding, weight, bias, norm_weight, _, head = model.parameters()
    optimizer = torch.optim.AdamW(
        [{"params": [embedding, weight, norm_weight, head]}, {"params": [bias]}], lr=1e-3, eps=1e-3
    )  # the bias of the norm is in no group
    for parameter in (embedding, weight, norm_weight, head):
        parameter.grad = torch.ones_like(parameter)
    embedding.grad[2:5] = 0  # rows that no token has used: v = 0
    weight.grad[0] = 1e-6  # sqrt(v̂) below ε
    optimizer.step()  # `bias` is held but has never been stepped
    optimizer.zero_grad()
    gradients = gradients_of(model)
    gradients[0][3, 1] = 0.0  # no second moment, but no gradient either: does not count
    preconditioner = preconditioner_of(model, optimizer)
    found = preconditioner.apply_preconditioner(gradients)
    assert not found[0][2:5].any()
    assert not found[2].any()
    assert not found[4].any()
    used = [found[0][:2], found[0][5:], found[1], found[3], found[5]]
    assert all(bool((piece != 0).all()) for piece in used)
    assert float(found[5].abs().max()) == pytest.approx(float(gradients[5].abs().max()) / (1 + 1e-3))
    excluded = preconditioner.excluded(gradients)
    assert excluded.zero_moment == 3 * 4 - 1
    assert excluded.without_state == 5
    assert excluded.not_in_optimizer == 5
    assert excluded.below_eps == 4
    lost = sum(float(g.square().sum()) for g in (gradients[0][2:5], gradients[2], gradients[4]))
    total = sum(float(g.square().sum()) for g in gradients)
    assert excluded.share == pytest.approx(lost / total, rel=1e-12)


def test_too_large_a_share_without_second_moment_is_an_error_that_counts_it() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.weight.grad = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    optimizer.step()
    excluded = preconditioner_of(model, optimizer).excluded([torch.tensor([[3.0, 0.0, 4.0]]).double()])
    assert excluded.share == pytest.approx(16 / 25)
    check_excluded(excluded, 0.64 + 1e-9)
    with pytest.raises(GradientCoverageError, match=r"64\.0% of .* \(1 with v = 0, 0 never stepped, 0 not in"):
        check_excluded(excluded, 0.63)


def test_a_gradient_of_zero_has_no_share_to_lose() -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    assert preconditioner_of(model, optimizer).excluded([torch.zeros_like(p) for p in model.parameters()]).share == 0


def test_a_preconditioner_does_not_outlive_an_optimizer_step() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    step()
    state = AdamState.from_optimizer(optimizer, model)
    preconditioner = AdamPreconditioner(state, ParameterRegistry.build(model, state.group_of))
    gradients = [torch.ones_like(p) for p in model.parameters()]
    preconditioner.apply_preconditioner(gradients)
    step()
    with pytest.raises(OptimizerStateError, match="has stepped since"):
        preconditioner.apply_preconditioner(gradients)


@pytest.mark.parametrize("rate", [5e-324, 1e-310])
def test_rates_that_underflow_are_refused(rate: float) -> None:
    model = small_model()
    with pytest.raises(LearningRateError, match=r"the given value is .*so small that lr · U underflows"):
        preconditioner_of(model, stepped_adam(model), learning_rate=rate)


@pytest.mark.parametrize(
    "rate", [True, "1e-3", 10**400, None, [1e-3], torch.ones(2), torch.tensor(True), np.bool_(True)]
)
def test_rates_that_are_no_numbers_are_refused(rate: Any) -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    if rate is None:  # no rate given: the optimizer's
        assert preconditioner_of(model, optimizer, learning_rate=rate).learning_rate == 1e-3
        return
    with pytest.raises(LearningRateError, match=r"the given value is .*, no number"):
        preconditioner_of(model, optimizer, learning_rate=rate)


@pytest.mark.parametrize("rate", [2, np.float32(0.5), np.int64(3), torch.tensor(0.25), torch.tensor([4])])
def test_rates_in_other_forms_of_a_number(rate: Any) -> None:
    model = small_model()
    found = preconditioner_of(model, stepped_adam(model), learning_rate=rate).learning_rate
    assert type(found) is float
    assert found == float(rate)


def test_groups_whose_rates_have_no_common_scale_are_refused() -> None:
    model = small_model()
    optimizer = stepped_adam(model)
    optimizer.param_groups[1]["lr"] = 1e-60
    with pytest.raises(LearningRateError, match="some are outside of single precision"):
        preconditioner_of(model, optimizer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_its_parameter_named(value: float) -> None:
    model = small_model()
    gradients = gradients_of(model)
    gradients[2][1] = value
    gradients[3][0] = value
    with pytest.raises(
        GradientCoverageError, match=r"gradient of '1\.bias' has 1 elements that are not finite \(of 5\)"
    ):
        preconditioner_of(model, stepped_adam(model)).excluded(gradients)


def test_a_gradient_whose_norm_overflows_is_refused() -> None:
    model = small_model()
    gradients = gradients_of(model)
    gradients[1][0, 0] = 1e200
    with pytest.raises(GradientCoverageError, match=r"gradient of '1\.weight' has a norm too large"):
        preconditioner_of(model, stepped_adam(model)).excluded(gradients)


@pytest.mark.parametrize("case", ["never stepped", "not in the optimizer", "v is 0 where g is not"])
def test_a_step_of_nothing_is_an_error_whatever_the_limit(case: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    gradients = [torch.ones_like(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model[0].parameters() if case == "not in the optimizer" else model.parameters())
    if case != "never stepped":
        model[0].weight.grad = torch.ones_like(model[0].weight)
        model[0].weight.grad[0] = 0
        optimizer.step()
        gradients[0] = torch.zeros_like(gradients[0])
    if case == "v is 0 where g is not":
        gradients[0][0] = 0.1  # an element whose square is rounded
        gradients[1].zero_()
    excluded = preconditioner_of(model, optimizer).excluded(gradients)
    assert excluded.share == 1
    with pytest.raises(
        GradientCoverageError, match=r"100\.0% of .* that is all of it, so there is no step to estimate"
    ):
        check_excluded(excluded, 1.0)


@pytest.mark.parametrize(("group", "moment"), [({"eps": 1e300}, 1.0), ({}, 3e38), ({"eps": 0.0, "lr": 1e34}, 1e-44)])
def test_a_preconditioner_outside_of_its_type_is_refused_and_no_zero_or_infinity(
    group: dict[str, float], moment: float
) -> None:
    model = small_model().float()
    optimizer = torch.optim.AdamW([{"params": p, "lr": 1e-3} for p in model.parameters()])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.param_groups[1].update(group)
    optimizer.state[model[1].weight]["exp_avg_sq"][0, 0] = moment
    preconditioner = preconditioner_of(model, optimizer)
    ones = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(OptimizerStateError, match=r"P of parameter '1\.weight' is 0 or infinite in torch\.float32"):
        preconditioner.apply_preconditioner(ones)
