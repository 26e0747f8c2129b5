"""Slices put together, against the same vocabulary in one piece: both in plain torch."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import pytest
import torch
from linear_cases import LinearCase, certain_case, make_linear_case, reference_of
from logprob_cases import IGNORE
from torch import Tensor
from vocabulary_cuts import cut_cases

from entropy_fast import reference


def in_slices(case: LinearCase, sizes: list[int], **options: bool) -> reference.LinearTokenLogprobs:
    return reference.sliced_linear_token_logprobs(
        case.hidden,
        case.weight.split(sizes),
        case.targets,
        biases=None if case.bias is None else case.bias.split(sizes),
        softcap=case.softcap,
        want_entropy=True,
        ignore_index=IGNORE,
        **options,
    )


@hypothesis.given(cut_cases())
def test_values_and_unit_gradients(drawn: tuple[LinearCase, list[int]]) -> None:
    case, sizes = drawn
    found, whole = in_slices(case, sizes, unit_gradients=True), reference_of(case)
    for name, one, two in zip(found._fields, found, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=2e-12, msg=lambda text, name=name: f"{name}: {text}")


@hypothesis.given(cut_cases())
def test_gradients(drawn: tuple[LinearCase, list[int]]) -> None:
    case, sizes = drawn
    grads = []
    for way in ("slices", "whole"):
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
        own = dataclasses.replace(case, hidden=leaves[0], weight=leaves[1], bias=leaves[2])
        if way == "slices":
            found = in_slices(own, sizes)
        else:
            found = reference.linear_token_logprobs(
                *own.arguments()[0], **own.arguments()[1], want_entropy=True, ignore_index=IGNORE
            )
        (found.logprob.sin() + found.lse.sin() + found.entropy.sin()).sum().backward()
        grads.append([t.grad for t in leaves])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_forward_mode_and_second_derivatives() -> None:
    case = make_linear_case(3, 2, 7, torch.float64, bias=True, softcap=2.0, masked=0)
    inputs = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = in_slices(dataclasses.replace(case, hidden=hidden, weight=weight, bias=bias), [3, 0, 4])
        return found.logprob, found.lse, found.entropy

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_rows_that_are_nearly_certain() -> None:
    case = certain_case(torch.float64, vocabulary=50)
    for found, expected in zip(in_slices(case, [17, 17, 16], unit_gradients=True), reference_of(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_one_slice_is_the_whole_to_the_last_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_linear_case(5, 6, 20, dtype, bias=True, softcap=4.0)
        arguments, options = case.arguments()
        options |= {"want_entropy": True, "unit_gradients": True, "ignore_index": IGNORE}
        found, whole = (
            in_slices(case, [20], unit_gradients=True),
            reference.linear_token_logprobs(*arguments, **options),
        )
        assert all(torch.equal(one, two) for one, two in zip(found[1:], whole[1:], strict=True))


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_rows_without_a_distribution_are_nan(value: float) -> None:
    case = make_linear_case(4, 3, 9, torch.float64, bias=True, masked=0)
    bias = torch.full((9,), value) if value == -torch.inf else case.bias.index_fill(0, torch.tensor([7]), value)
    found = in_slices(dataclasses.replace(case, bias=bias), [4, 5], unit_gradients=True)
    assert all(part.isnan().all() for part in (found.logprob, found.entropy, found.unit_logprob, found.unit_entropy))
    assert found.lse.eq(value).all() or (math.isnan(value) and found.lse.isnan().all())


def test_an_impossible_target_in_a_slice_without_probability() -> None:
    case = make_linear_case(3, 3, 9, torch.float64, bias=True, masked=0)
    bias = case.bias.clone()
    bias[5:] = -torch.inf
    case = dataclasses.replace(case, bias=bias, targets=torch.tensor([8, 5, 0]))
    found, whole = in_slices(case, [5, 4], unit_gradients=True), reference_of(case)
    assert found.logprob[:2].eq(-torch.inf).all()
    torch.testing.assert_close(found.unit_logprob, whole.unit_logprob)
    torch.testing.assert_close(found.entropy, whole.entropy)
