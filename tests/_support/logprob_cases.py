"""Inputs for token_logprobs, and the rule by which a result of it is judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fast import reference

IGNORE = -100
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call, forward and backward."""

    logits: Tensor
    targets: Tensor
    grad_logprob: Tensor
    grad_lse: Tensor


@dataclass(frozen=True)
class Outcome:
    """What an implementation makes of a case; ``lse`` in float64 or in the dtype of ``logprob``."""

    logprob: Tensor
    lse: Tensor
    grad_logits: Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make_case(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    offset: float = 0.0,
    scale: float = 4.0,
    padding: int = 0,
    masked: float = 0.2,
) -> Case:
    """Random logits around ``offset``, rows ``vocabulary + padding`` apart; a share ``masked`` of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, vocabulary + padding, generator=generator, dtype=torch.float64) * scale + offset
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < masked] = IGNORE
    return with_gradients(wide.to(dtype)[:, :vocabulary], targets, seed)


def with_gradients(logits: Tensor, targets: Tensor, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed + 1)
    grad_logprob = torch.randn(len(targets), generator=generator, dtype=torch.float64).to(accumulator(logits.dtype))
    grad_lse = torch.randn(len(targets), generator=generator, dtype=torch.float64)
    return Case(logits, targets, grad_logprob, grad_lse)


def special_rows(vocabulary: int, dtype: torch.dtype) -> Case:
    """One row of each kind: NaN, +inf, -inf, all of them together, throughout or in places; all near -110 or -130."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(11, vocabulary, generator=generator, dtype=torch.float64)
    nan, inf = float("nan"), float("inf")
    logits[0, vocabulary // 2] = nan
    logits[1] = nan
    logits[2, 0] = inf
    logits[3, : vocabulary // 2] = -inf
    logits[4] = -inf
    logits[5, 0], logits[5, -1] = nan, inf
    logits[6] = nan
    logits[7, -1] = inf
    logits[8] -= 110
    logits[9] -= 130
    targets = torch.full((11,), vocabulary - 1)
    targets[6] = IGNORE
    return with_gradients(logits.to(dtype), targets)


def truth_of(case: Case) -> Outcome:
    """Float64 results for the very numbers of the case, by autograd through torch's own functions."""
    logits = case.logits.detach().double().requires_grad_()
    logprob, lse = reference.token_logprobs(logits, case.targets, ignore_index=IGNORE)
    gradient = torch.autograd.grad([logprob, lse], logits, [case.grad_logprob.double(), case.grad_lse])[0]
    # Masking by multiplication and by selection differ where a row is not finite; the documented answer is NaN.
    unusable = ~lse.isfinite() & (case.targets != IGNORE)
    gradient = torch.where(unusable.unsqueeze(1), float("nan"), gradient)
    return Outcome(logprob.detach(), lse.detach(), gradient)


def eager_of(case: Case) -> Outcome:
    """What plain torch makes of it in the dtype of the computation."""
    logits = case.logits.detach().to(accumulator(case.logits.dtype)).requires_grad_()
    ignored = case.targets == IGNORE
    clean = logits.masked_fill(ignored.unsqueeze(1), 0.0)
    index = case.targets.masked_fill(ignored, 0).unsqueeze(1)
    logprob = torch.log_softmax(clean, dim=1).gather(1, index).squeeze(1).masked_fill(ignored, 0.0)
    lse = torch.logsumexp(clean, dim=1).masked_fill(ignored, 0.0)
    grads = [case.grad_logprob, case.grad_lse.to(lse.dtype)]
    gradient = torch.autograd.grad([logprob, lse], logits, grads)[0]
    return Outcome(logprob.detach(), lse.detach(), gradient.to(case.logits.dtype))


def _check(
    name: str, fast: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, allowance: Tensor | None = None
) -> None:
    fast, eager = fast.double(), eager.double()
    assert fast.shape == truth.shape, f"{name}: shape {tuple(fast.shape)}, expected {tuple(truth.shape)}"
    wrong_kind = ~torch.isfinite(truth) & ~torch.isclose(fast, truth, equal_nan=True)
    assert not wrong_kind.any(), f"{name}: {fast[wrong_kind][:5]} where the truth is {truth[wrong_kind][:5]}"
    finite = torch.isfinite(truth)
    allowed = torch.zeros_like(truth) if allowance is None else allowance.expand_as(truth)
    fast, eager, truth = fast[finite], eager[finite], truth[finite]
    eager_error = torch.nan_to_num((eager - truth).abs(), nan=0.0, posinf=0.0)
    # A few roundings of the result itself, and the smallest number its dtype can tell from 0.
    tolerance = 4 * torch.finfo(dtype).eps * truth.abs() + 1e-6 * torch.finfo(accumulator(dtype)).eps
    tolerance += 4 * torch.finfo(accumulator(dtype)).eps + torch.finfo(dtype).smallest_normal
    excess = (fast - truth).abs() - 2 * eager_error - tolerance - allowed[finite]
    assert not (~(excess <= 0)).any(), f"{name}: off by {(fast - truth).abs().max()}, too much by {excess.max()}"


def assert_right(fast: Outcome, case: Case) -> None:
    """|fast - truth| <= 2 |eager - truth| + a few units in the last place, for each element; NaN and inf must match."""
    truth, eager = truth_of(case), eager_of(case)
    dtype = case.logits.dtype
    assert fast.logprob.dtype == accumulator(dtype)
    assert fast.grad_logits.dtype == dtype
    _check("logprob", fast.logprob, eager.logprob, truth.logprob, accumulator(dtype))
    _check("lse", fast.lse, eager.lse, truth.lse, accumulator(dtype))
    # The backward starts from a float64 lse: more than enough for the other dtypes, one rounding of it for float64.
    rounding = torch.finfo(torch.float64).eps * truth.lse.abs() * (case.grad_logprob.abs() + case.grad_lse.abs())
    _check("grad_logits", fast.grad_logits, eager.grad_logits, truth.grad_logits, dtype, rounding.unsqueeze(1))
