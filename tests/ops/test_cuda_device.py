"""The CUDA kernels on a device, against the references in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import CHUNK, AccumulateCase, accumulate_case, assert_accumulated
from logprob_cases import DTYPES, IGNORE, Case, Outcome, assert_right, make_case, shaped_rows, special_rows
from torch import Tensor

from entropy_fast import ops
from entropy_fast.ops import native_backend
from entropy_fast.ops.accumulation_table import accumulation_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _copy(tensor: Tensor) -> Tensor:
    """On the device, with the strides that the tensor has here."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return copy.copy_(tensor)


def _run(case: Case, *, in_place: bool = False) -> Outcome:
    """The kernels themselves, on outputs filled with NaN."""
    logits, targets = _copy(case.logits), case.targets.cuda()
    logprob = torch.full(targets.shape, torch.nan, dtype=case.grad_logprob.dtype, device="cuda")
    lse = torch.full(targets.shape, torch.nan, dtype=torch.float64, device="cuda")
    entropy = grad_entropy = None
    if case.grad_entropy is not None:
        entropy, grad_entropy = torch.full_like(lse, torch.nan), case.grad_entropy.cuda()
    native_backend.token_logprobs_forward(logits, targets, logprob, lse, entropy, IGNORE)
    grads = logits if in_place else torch.full(logits.shape, torch.nan, dtype=logits.dtype, device="cuda")
    native_backend.token_logprobs_backward(
        case.grad_logprob.cuda(), case.grad_lse.cuda(), grad_entropy, logits, targets, lse, entropy, grads, IGNORE
    )
    return Outcome(logprob.cpu(), lse.cpu(), grads.cpu().contiguous(), None if entropy is None else entropy.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
class TestTokenLogprobs:
    @pytest.mark.parametrize("vocabulary", [1, 31, 513, 4096, 50257, 151936])
    @pytest.mark.parametrize("in_place", [False, True], ids=["", "in_place"])
    def test_sizes(self, vocabulary: int, in_place: bool, dtype: torch.dtype, entropy: bool) -> None:
        for padding in (0, 1, 8):
            case = make_case(5, vocabulary, dtype, padding=padding, seed=vocabulary, entropy=entropy)
            assert_right(_run(case, in_place=in_place), case)

    def test_special_rows(self, dtype: torch.dtype, entropy: bool) -> None:
        cases = (
            special_rows(17, dtype, entropy=entropy),
            special_rows(6000, dtype, entropy=entropy),
            shaped_rows(5003, dtype, entropy=entropy),
            make_case(2, 6000, dtype, offset=1e4, entropy=entropy),
            make_case(0, 9, dtype, entropy=entropy),
        )
        for case in cases:
            assert_right(_run(case), case)

    def test_two_runs_give_the_same_bits(self, dtype: torch.dtype, entropy: bool) -> None:
        case = make_case(64, 50257, dtype, entropy=entropy)
        first, second = _run(case), _run(case, in_place=True)
        assert torch.equal(first.logprob, second.logprob) and torch.equal(first.lse, second.lse)
        assert torch.equal(first.grad_logits, second.grad_logits)
        assert first.entropy is None or second.entropy is None or torch.equal(first.entropy, second.entropy)


@pytest.mark.parametrize("overwrite", [False, True])
def test_token_logprobs_by_autograd(overwrite: bool) -> None:
    case = make_case(6, 5003, torch.float32, entropy=True)
    leaf = case.logits.cuda().requires_grad_()
    results = ops.token_logprobs(
        leaf * 1.0, case.targets.cuda(), want_entropy=True, overwrite_logits=overwrite, backend="cuda"
    )
    assert results.entropy is not None and case.grad_entropy is not None
    upstream = (case.grad_logprob, case.grad_lse, case.grad_entropy)
    torch.autograd.backward(list(results), [part.to("cuda", torch.float32) for part in upstream])
    assert leaf.grad is not None
    parts = (results.logprob, results.lse, leaf.grad, results.entropy)
    rounded = Case(case.logits, case.targets, *(part.float().to(part.dtype) for part in upstream))
    assert_right(Outcome(*(part.detach().cpu() for part in parts)), rounded)


def _on_device(case: AccumulateCase) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    parts = [[tensor.cuda() for tensor in tensors] for tensors in (case.x, case.g, case.x_sum, case.y_sum)]
    return parts, [None if tensor is None else tensor.cuda() for tensor in case.v]


@pytest.mark.parametrize("update", [True, False])
def test_precondition_accumulate(update: bool) -> None:
    case = accumulate_case(update=update)
    bias_correction, eps, ratio = ([row[column] for row in case.factors] for column in range(3))
    results = []
    for _ in range(2):
        (x, g, x_sum, y_sum), v = _on_device(case)
        dots = ops.precondition_accumulate(
            x,
            g,
            v,
            x_sum,
            y_sum,
            bias_correction=bias_correction,
            eps=eps,
            ratio=ratio,
            x_scale=case.x_scale,
            g_scale=case.g_scale,
            update=update,
            backend="cuda",
        )
        results.append(dots.cpu())
        assert_accumulated(results[-1], [t.cpu() for t in x_sum], [t.cpu() for t in y_sum], case)
    assert torch.equal(*results), "two runs differ"


def test_precondition_accumulate_in_a_cuda_graph() -> None:
    case = accumulate_case((0, 1, CHUNK + 1))
    (x, g, x_sum, y_sum), v = _on_device(case)
    table = accumulation_table(x, g, v, x_sum, y_sum, case.factors)
    dots = torch.full((table.n_tensors, 3), torch.nan, dtype=torch.float64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        native_backend.precondition_accumulate(table, dots, case.x_scale, case.g_scale, True)
    # Recorded, not run.
    assert dots.isnan().all()
    for _ in range(2):
        for sums, before in ((x_sum, case.x_sum), (y_sum, case.y_sum)):
            for tensor, start in zip(sums, before, strict=True):
                tensor.copy_(start)
        graph.replay()
        torch.cuda.synchronize()
        assert_accumulated(dots.cpu(), [t.cpu() for t in x_sum], [t.cpu() for t in y_sum], case)
