"""The reference against torch's own functions, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from logprob_cases import DTYPES, IGNORE, make_case, special_rows

from entropy_fast import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_log_softmax_at_the_target(dtype: torch.dtype) -> None:
    case = make_case(9, 101, dtype)
    logprob, lse = reference.token_logprobs(case.logits, case.targets, ignore_index=IGNORE)
    kept = case.targets != IGNORE
    wide = case.logits.double()[kept]
    expected = torch.log_softmax(wide, 1).gather(1, case.targets[kept].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprob[kept].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[kept], torch.logsumexp(wide, 1), rtol=1e-14, atol=1e-14)
    assert (lse.dtype, logprob.dtype) == (torch.float64, case.grad_logprob.dtype)
    assert not logprob[~kept].any()
    assert not lse[~kept].any()


def test_rows_that_are_not_finite() -> None:
    case = special_rows(10, torch.float32)
    logprob, lse = reference.token_logprobs(case.logits, case.targets, ignore_index=IGNORE)
    assert logprob.isfinite().tolist() == [False, False, False, True, False, False, True, False, True, True, True]
    assert lse.isnan().tolist() == [True, True, False, False, False, True, *([False] * 5)]
    assert (lse[2], lse[4], lse[6], lse[7]) == (float("inf"), float("-inf"), 0.0, float("inf"))


def test_backward_is_the_gradient_of_the_forward() -> None:
    case = make_case(6, 23, torch.float64)
    logits = case.logits.clone().requires_grad_()
    logprob, lse = reference.token_logprobs(logits, case.targets, ignore_index=IGNORE)
    (expected,) = torch.autograd.grad([logprob, lse], logits, [case.grad_logprob, case.grad_lse])
    actual = reference.token_logprobs_backward(
        case.grad_logprob, case.grad_lse, case.logits, case.targets, lse.detach(), ignore_index=IGNORE
    )
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert expected.abs().max() > 0.1


def test_derivatives_in_both_modes() -> None:
    targets = torch.tensor([0, IGNORE, 4])
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reference.token_logprobs(x, targets), logits, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: reference.token_logprobs(x, targets), logits)

    case = make_case(3, 5, torch.float64, masked=0)
    inputs = [case.grad_logprob, case.grad_lse, case.logits.contiguous(), torch.randn(3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda g, h, x, lse: reference.token_logprobs_backward(g, h, x, targets, lse),
        [tensor.clone().requires_grad_() for tensor in inputs],
    )


def test_masked_rows_are_not_read() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [0.0, 0.0]], requires_grad=True)
    logprob, _ = reference.token_logprobs(logits, torch.tensor([IGNORE, 1]))
    logprob.sum().backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-0.5, 0.5]]))
