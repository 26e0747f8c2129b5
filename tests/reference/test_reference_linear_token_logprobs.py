"""The reference against matrix product, log-softmax and autograd."""

from __future__ import annotations

import pytest
import torch
from linear_cases import certain_case, make_linear_case, plain, reference_of

from entropy_fast import reference


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_unit_gradients(bias: bool, softcap: float | None) -> None:
    case = make_linear_case(7, 9, 31, torch.float64, bias=bias, softcap=softcap)
    for name, found, expected in zip(
        reference.LinearTokenLogprobs._fields, reference_of(case), plain(case), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)


def test_rows_that_are_nearly_certain() -> None:
    case = certain_case(torch.float64, vocabulary=50)
    for found, expected in zip(reference_of(case), plain(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_without_unit_gradients_it_is_differentiable() -> None:
    case = make_linear_case(4, 3, 7, torch.float64, bias=True, softcap=2.0)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.hidden, case.weight, case.bias)]

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = reference.linear_token_logprobs(hidden, weight, case.targets, bias=bias, softcap=2.0, want_entropy=True)
        return tuple(found[:3])

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
