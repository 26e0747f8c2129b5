"""Run the Triton kernels in Triton's interpreter against the truth. A process of its own, with TRITON_INTERPRET=1.

One argument, a key of `CHECKS`.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from logprob_cases import (
    DTYPES,
    IGNORE,
    Case,
    Outcome,
    assert_right,
    make_case,
    shaped_rows,
    special_rows,
    with_gradients,
)
from triton_cases import (
    LinearCase,
    assert_fold_right,
    assert_linear_right,
    make_fold_case,
    make_linear_case,
)

from entropy_fast import ops
from entropy_fast.kernels.linear_token_logprobs import tiles_for
from entropy_fast.kernels.token_logprobs import BLOCK
from entropy_fast.ops import linear_token_logprobs, triton_backend, triton_launch_linear
from entropy_fast.ops.accumulation_table import CHUNK
from entropy_fast.ops.linear_inputs import LinearInputs
from entropy_fast.reference import LinearTokenLogprobs


def run_triton(case: Case, in_place: bool = False) -> Outcome:
    """On outputs that are NaN before; the gradient over a copy of the logits, or in rows that lie apart."""
    rows, vocabulary = case.logits.shape
    logprob = torch.full((rows,), float("nan"), dtype=case.grad_logprob.dtype)
    lse = torch.full((rows,), float("nan"), dtype=torch.float64)
    entropy = None if case.grad_entropy is None else torch.full_like(lse, float("nan"))
    padded = torch.full((rows, vocabulary + 5), float("nan"), dtype=case.logits.dtype)
    gradient = padded[:, :vocabulary]
    logits = gradient.copy_(case.logits) if in_place else case.logits
    triton_backend.token_logprobs_forward(logits, case.targets, logprob, lse, entropy, IGNORE)
    upstream = (case.grad_logprob, case.grad_lse, case.grad_entropy)
    triton_backend.token_logprobs_backward(*upstream, logits, case.targets, lse, entropy, gradient, IGNORE)
    assert padded[:, vocabulary:].isnan().all()
    return Outcome(logprob, lse, gradient, entropy)


def check_token_logprobs() -> int:
    checked = 0
    for dtype in DTYPES:
        for entropy in (False, True):
            one = {"dtype": dtype, "entropy": entropy}
            sizes = (1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 50257)
            cases = [make_case(3, size, padding=3, **one) for size in sizes]
            cases += [make_case(rows, 100, **one) for rows in (0, 1, 13)]
            cases += [make_case(2, 5000, offset=offset, **one) for offset in (1e4, -1e4)]
            cases += [make_case(2, 5000, offset=offset, scale=1.0, **one) for offset in (-110.0, -130.0)]
            cases += [special_rows(17, **one), special_rows(BLOCK + 452, **one), make_case(4, 64, masked=1.1, **one)]
            cases += [shaped_rows(size, **one) for size in (17, 2 * BLOCK + 9)]
            for case in cases:
                assert_right(run_triton(case, in_place=entropy), case)
                checked += 1
    outside = with_gradients(torch.zeros(2, 8), torch.tensor([8, -1]), entropy=True)
    assert all(part.isnan().all() for part in dataclasses.astuple(run_triton(outside)))

    logits = torch.randn(4, 30, requires_grad=True)
    ops.token_logprobs(logits, torch.tensor([0, 1, -100, 29]), backend="triton").logprob.sum().backward()
    record = next(record for record in ops.backend_report() if record.name == "triton")
    assert (record.available, record.calls) == (True, 2)
    return checked


def run_linear(case: LinearCase) -> LinearTokenLogprobs:
    return triton_backend.linear_token_logprobs(
        LinearInputs(case.hidden, case.weight, case.targets, bias=case.bias, **case.options())
    )


def poison_new_memory() -> None:
    """Workspaces and results that the kernels leave alone are NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def check_linear_token_logprobs(*dtypes: torch.dtype) -> int:
    poison_new_memory()
    checked = 0
    for dtype in dtypes:
        tiles = tiles_for(8 * dtype.itemsize)
        around = (1, tiles.tokens - 1, tiles.tokens, tiles.tokens + 1)
        cases = [make_linear_case(5, vocabulary, 24, dtype) for vocabulary in around]
        cases += [make_linear_case(rows, 50, 24, dtype) for rows in (0, 1, tiles.rows - 1, tiles.rows, tiles.rows + 1)]
        cases += [make_linear_case(3, 70, units, dtype) for units in (1, tiles.units - 1, tiles.units, tiles.units + 1)]
        cases += [make_linear_case(6, 300, 40, dtype, softcap=softcap) for softcap in (0.7, 30.1)]
        offsets = (0.0, -110.0, -130.0, 1e4, -1e4)
        cases += [make_linear_case(6, 200, 40, dtype, bias=offset, scale=1.0) for offset in offsets]
        cases += [
            make_linear_case(6, 200, 40, dtype, likely=True, masked=0.0),
            make_linear_case(4, 33, 8, dtype, masked=1.1),
        ]
        cases += [
            make_linear_case(6, 200, 40, dtype, scale=1e-3),
            make_linear_case(6, 130, 40, dtype, bias=1.0, softcap=5.0),
        ]
        for case in cases:
            assert_linear_right(run_linear(case), case)
            checked += 1
        check_special_hidden_states(dtype)
        check_rows_alone(dtype)
    check_interfaces()
    return checked


def check_special_hidden_states(dtype: torch.dtype) -> None:
    """A NaN or an infinity stays in its row; a bias of -inf is a token of probability 0; so is the target then."""
    case = make_linear_case(7, 90, 24, dtype, masked=0.0, bias=0.0)
    clean = run_linear(case)
    hidden = case.hidden.clone()
    hidden[1, 3], hidden[4, 0] = float("nan"), float("inf")
    spoiled = run_linear(dataclasses.replace(case, hidden=hidden))
    for part, reference_part in zip(spoiled, clean, strict=True):
        keep = [0, 2, 3, 5, 6]
        assert torch.equal(part[keep], reference_part[keep])
    for part in (spoiled.logprob, spoiled.entropy, spoiled.unit_logprob, spoiled.unit_entropy):
        assert part[[1, 4]].isnan().all()
    bias = case.bias.clone()
    bias[[5, int(case.targets[0])]] = float("-inf")
    excluded = dataclasses.replace(case, bias=bias)
    found = run_linear(excluded)
    assert found.logprob[0] == float("-inf")
    assert_linear_right(found, excluded)
    outside = run_linear(dataclasses.replace(case, targets=torch.full((7,), 90)))
    assert all(part.isnan().all() for part in outside)


def check_rows_alone(dtype: torch.dtype) -> None:
    """A row gives the same bits alone, in a batch, and in another piece of the workspace; rows may lie apart."""
    case = make_linear_case(150, 50, 24, dtype, masked=0.0)
    together = run_linear(case)
    workspace = triton_launch_linear.WORKSPACE_BYTES
    triton_launch_linear.WORKSPACE_BYTES = 1
    in_pieces = run_linear(case)
    triton_launch_linear.WORKSPACE_BYTES = workspace
    apart = torch.full((150, 30), float("nan"), dtype=dtype)
    apart[:, :24] = case.hidden
    strided = run_linear(dataclasses.replace(case, hidden=apart[:, :24]))
    alone = run_linear(dataclasses.replace(case, hidden=case.hidden[77:78], targets=case.targets[77:78]))
    for whole, pieces, other, one in zip(together, in_pieces, strided, alone, strict=True):
        assert torch.equal(whole, pieces)
        assert torch.equal(whole, other)
        assert torch.equal(whole[77:78], one)


def check_interfaces() -> None:
    """The op itself, its gradient, a weight of another dtype, and results without entropy or gradients."""
    case = make_linear_case(5, 40, 16, torch.float32)
    hidden = case.hidden.clone().requires_grad_()
    result = linear_token_logprobs(hidden, case.weight, case.targets, ignore_index=IGNORE, backend="triton")
    assert result.entropy is None
    result.logprob.sum().backward()
    assert_linear_right(run_linear(case)._replace(unit_logprob=hidden.grad), case)
    half = make_linear_case(5, 40, 16, torch.bfloat16)
    wide = dataclasses.replace(half, weight=half.weight.float())
    assert all(torch.equal(one, other) for one, other in zip(run_linear(half), run_linear(wide), strict=True))


GRADIENTS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "bf16 moments": (torch.bfloat16, torch.bfloat16),
    "fp64": (torch.float64, torch.float64),
    "no moment": (torch.bfloat16, None),
}


def check_precondition_accumulate() -> int:
    checked = 0
    sizes = (1, 0, 1023, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2, 3 * CHUNK + 5)
    lists = [([kind], sizes) for kind in GRADIENTS.values()] + [(list(GRADIENTS.values()), (7, 0, CHUNK + 1))]
    for kinds, tensor_sizes in lists:
        for update in (True, False):
            before = make_fold_case(kinds, tensor_sizes)
            fast = before.clone()
            dots = ops.precondition_accumulate(
                fast.x, fast.g, fast.v, fast.x_sum, fast.y_sum, update=update, backend="triton", **fast.factors()
            )
            assert_fold_right(fast, dots, before, update)
            checked += 1
    # Where v is 0, y is 0 times g: nothing for a number, and not hidden where g is none. A NaN in v is not one of 0.
    case = make_fold_case([GRADIENTS["fp32"]], (8,))
    case.v[0][:] = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, float("nan")])
    case.g[0][:2] = torch.tensor([float("nan"), torch.inf])
    before_y = case.y_sum[0].clone()
    ops.precondition_accumulate(case.x, case.g, case.v, case.x_sum, case.y_sum, backend="triton", **case.factors())
    assert case.y_sum[0][2] == before_y[2]
    assert case.y_sum[0].isnan().tolist() == [True, True, *[False] * 5, True]
    empty = ops.precondition_accumulate([], [], [], [], [], bias_correction=[], eps=[], backend="triton")
    assert empty.shape == (0, 3)
    return checked


CHECKS = {
    "token_logprobs": check_token_logprobs,
    "linear_token_logprobs": lambda: check_linear_token_logprobs(torch.float32, torch.float64, torch.bfloat16),
    "linear_token_logprobs of float16": lambda: check_linear_token_logprobs(torch.float16),
    "precondition_accumulate": check_precondition_accumulate,
}


if __name__ == "__main__":
    print(f"checked {CHECKS[sys.argv[1]]()}")
