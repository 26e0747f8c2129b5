"""The reference against torch's own functions, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from logprob_cases import DTYPES, IGNORE, make_case, special_rows

from entropy_fast import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_log_softmax_at_the_target(dtype: torch.dtype) -> None:
    case = make_case(9, 101, dtype)
    logprob, lse, _ = reference.token_logprobs(case.logits, case.targets, ignore_index=IGNORE)
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
    logprob, lse, _ = reference.token_logprobs(case.logits, case.targets, ignore_index=IGNORE)
    assert logprob.isfinite().tolist() == [False, False, False, True, False, False, True, False, True, True, True]
    assert lse.isnan().tolist() == [True, True, False, False, False, True, *([False] * 5)]
    assert (lse[2], lse[4], lse[6], lse[7]) == (float("inf"), float("-inf"), 0.0, float("inf"))


def test_backward_is_the_gradient_of_the_forward() -> None:
    case = make_case(6, 23, torch.float64, entropy=True)
    logits = case.logits.clone().requires_grad_()
    outputs = reference.token_logprobs(logits, case.targets, want_entropy=True, ignore_index=IGNORE)
    grads = [case.grad_logprob, case.grad_lse, case.grad_entropy]
    (expected,) = torch.autograd.grad(outputs, logits, grads)
    _, lse, entropy = outputs
    actual = reference.token_logprobs_backward(
        case.grad_logprob,
        case.grad_lse,
        case.logits,
        case.targets,
        lse.detach(),
        grad_entropy=case.grad_entropy,
        entropy=entropy.detach(),
        ignore_index=IGNORE,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert expected.abs().max() > 0.1


def test_derivatives_in_both_modes() -> None:
    targets = torch.tensor([0, IGNORE, 4])
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def with_entropy(x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return reference.token_logprobs(x, targets, want_entropy=True)

    assert torch.autograd.gradcheck(with_entropy, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(with_entropy, logits)

    case = make_case(3, 5, torch.float64, masked=0)
    normaliser = [torch.randn(3, dtype=torch.float64) for _ in range(3)]
    inputs = [case.grad_logprob, case.grad_lse, case.logits.contiguous(), *normaliser]
    assert torch.autograd.gradcheck(
        lambda g, h, x, lse, e, entropy: reference.token_logprobs_backward(
            g, h, x, targets, lse, grad_entropy=e, entropy=entropy
        ),
        [tensor.clone().requires_grad_() for tensor in inputs],
    )


def test_masked_rows_are_not_read() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [0.0, 0.0]], requires_grad=True)
    logprob, _, _ = reference.token_logprobs(logits, torch.tensor([IGNORE, 1]))
    logprob.sum().backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-0.5, 0.5]]))
