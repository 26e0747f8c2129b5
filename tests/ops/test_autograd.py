"""The op as torch sees it: schema, fake tensors, first and second derivatives, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from logprob_cases import make_case
from torch import Tensor

from entropy_fast import ops

TARGETS = torch.tensor([1, 2, -100, 4, 16])
BACKENDS = ("native", "reference")


def _both(backend: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda logits: tuple(ops.token_logprobs(logits, TARGETS, backend=backend))  # type: ignore[return-value]


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(backend: str) -> None:
    logits = torch.randn(5, 17, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_both(backend), logits)
    assert torch.autograd.gradgradcheck(_both(backend), logits)


def test_third_derivative_is_that_of_the_reference() -> None:
    logits = torch.randn(5, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for backend in BACKENDS:
        x = logits.clone().requires_grad_()
        y = ops.token_logprobs(x, TARGETS, backend=backend).logprob.pow(2).sum()
        for _ in range(3):
            (x_grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = x_grad.pow(2).sum()
        results.append(x_grad.detach())
    torch.testing.assert_close(*results)
    assert results[0].abs().max() > 0.1


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_opcheck(backend: str, requires_grad: bool) -> None:
    logits = torch.randn(5, 17, requires_grad=requires_grad)
    namespace = torch.ops.entropy_fast
    torch.library.opcheck(namespace.token_logprobs.default, (logits, TARGETS, -100, backend))
    lse = namespace.token_logprobs(logits, TARGETS)[1].detach().requires_grad_(requires_grad)
    grad_logprob = torch.randn(5, requires_grad=requires_grad)
    grad_lse = torch.randn(5, dtype=torch.float64, requires_grad=requires_grad)
    arguments = (grad_logprob, grad_lse, logits, TARGETS, lse, -100, backend)
    torch.library.opcheck(namespace.token_logprobs_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return ops.token_logprobs(logits * 2, targets).logprob.sum()

    case = make_case(6, 33, dtype)
    eager, compiled = (case.logits.clone().requires_grad_() for _ in range(2))
    loss(eager, case.targets).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled, case.targets).backward()
    assert torch.equal(eager.grad, compiled.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_alone(backend: str) -> None:
    logits = torch.randn(5, 17, requires_grad=True)
    result = ops.token_logprobs(logits, TARGETS, backend=backend)
    (gradient,) = torch.autograd.grad(result.lse.sum(), logits)
    expected = torch.softmax(logits.detach(), 1)
    expected[2] = 0
    torch.testing.assert_close(gradient, expected)


def test_logits_may_require_no_gradient() -> None:
    assert not ops.token_logprobs(torch.zeros(5, 17), TARGETS).logprob.requires_grad
