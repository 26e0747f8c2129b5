"""Run the Triton kernels in Triton's interpreter against the truth. A process of its own, with TRITON_INTERPRET=1."""

from __future__ import annotations

import torch
from logprob_cases import DTYPES, IGNORE, Case, Outcome, assert_right, make_case, special_rows

from entropy_fast import ops
from entropy_fast.kernels.token_logprobs import BLOCK
from entropy_fast.ops import triton_backend


def run_triton(case: Case) -> Outcome:
    rows, vocabulary = case.logits.shape
    logprob = torch.full((rows,), float("nan"), dtype=case.grad_logprob.dtype)
    lse = torch.full((rows,), float("nan"), dtype=torch.float64)
    grad_logits = torch.full((rows, vocabulary), float("nan"), dtype=case.logits.dtype)
    triton_backend.forward(case.logits, case.targets, logprob, lse, IGNORE)
    triton_backend.backward(case.grad_logprob, case.grad_lse, case.logits, case.targets, lse, grad_logits, IGNORE)
    return Outcome(logprob, lse, grad_logits)


def main() -> None:
    checked = 0
    for dtype in DTYPES:
        cases = [make_case(3, size, dtype, padding=3) for size in (1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 50257)]
        cases += [make_case(rows, 100, dtype) for rows in (0, 1, 13)]
        cases += [make_case(2, 5000, dtype, offset=offset) for offset in (1e4, -1e4, -110.0, -130.0)]
        cases += [special_rows(17, dtype), special_rows(BLOCK + 452, dtype), make_case(4, 64, dtype, masked=1.1)]
        for case in cases:
            assert_right(run_triton(case), case)
            checked += 1
    outside = Case(torch.zeros(2, 8), torch.tensor([8, -1]), torch.ones(2), torch.ones(2).double())
    outcome = run_triton(outside)
    assert outcome.logprob.isnan().all()
    assert outcome.grad_logits.isnan().all()

    logits = torch.randn(4, 30, requires_grad=True)
    ops.token_logprobs(logits, torch.tensor([0, 1, -100, 29]), backend="triton").logprob.sum().backward()
    record = next(record for record in ops.backend_report() if record.name == "triton")
    assert (record.available, record.calls) == (True, 2)
    print(f"checked {checked}")


if __name__ == "__main__":
    main()
