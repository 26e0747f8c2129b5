"""Inputs for token_logprobs, and the rule by which a result of it is judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy_fast import reference

IGNORE = -100
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call, forward and backward; without ``grad_entropy`` no entropy is wanted."""

    logits: Tensor
    targets: Tensor
    grad_logprob: Tensor
    grad_lse: Tensor
    grad_entropy: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What an implementation makes of a case; ``lse`` and ``entropy`` in float64 or in the dtype of ``logprob``."""

    logprob: Tensor
    lse: Tensor
    grad_logits: Tensor
    entropy: Tensor | None = None


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
    entropy: bool = False,
) -> Case:
    """Random logits around ``offset``, rows ``vocabulary + padding`` apart; a share ``masked`` of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, vocabulary + padding, generator=generator, dtype=torch.float64) * scale + offset
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < masked] = IGNORE
    return with_gradients(wide.to(dtype)[:, :vocabulary], targets, seed, entropy=entropy)


def with_gradients(logits: Tensor, targets: Tensor, seed: int = 0, *, entropy: bool = False) -> Case:
    generator = torch.Generator().manual_seed(seed + 1)
    grad_logprob = torch.randn(len(targets), generator=generator, dtype=torch.float64).to(accumulator(logits.dtype))
    grad_lse = torch.randn(len(targets), generator=generator, dtype=torch.float64)
    grad_entropy = torch.randn(len(targets), generator=generator, dtype=torch.float64) if entropy else None
    return Case(logits, targets, grad_logprob, grad_lse, grad_entropy)


def special_rows(vocabulary: int, dtype: torch.dtype, *, entropy: bool = False) -> Case:
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
    return with_gradients(logits.to(dtype), targets, entropy=entropy)


def shaped_rows(vocabulary: int, dtype: torch.dtype, *, entropy: bool = True) -> Case:
    """One row of each shape: flat, one-hot at the target and elsewhere, nearly certain, two equal peaks, rising, falling."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(8, vocabulary, generator=generator, dtype=torch.float64)
    logits[0] = 3.0
    logits[1], logits[1, -1] = -torch.inf, 2.0
    logits[2, 0] = 60.0
    logits[3, -1] = 25.0
    logits[4, 0], logits[4, -1] = 40.0, 40.0
    logits[5] = torch.linspace(-60, 60, vocabulary, dtype=torch.float64)
    logits[6] = torch.linspace(60, -60, vocabulary, dtype=torch.float64)
    return with_gradients(logits.to(dtype), torch.full((8,), vocabulary - 1), entropy=entropy)


def truth_of(case: Case) -> Outcome:
    """Results for the very numbers of the case in a wider precision than theirs.

    By autograd through torch's own functions in float64; for float64 logits in NumPy's long double.
    """
    if case.logits.dtype == torch.float64 and torch.finfo(torch.float64).eps > np.finfo(np.longdouble).eps:
        return _long_double_truth(case)
    logits = case.logits.detach().double().requires_grad_()
    wanted = case.grad_entropy is not None
    logprob, lse, entropy = reference.token_logprobs(logits, case.targets, want_entropy=wanted, ignore_index=IGNORE)
    outputs = [(logprob, case.grad_logprob.double()), (lse, case.grad_lse), (entropy, case.grad_entropy)]
    used = [(output, grad) for output, grad in outputs if output is not None]
    gradient = torch.autograd.grad([output for output, _ in used], logits, [grad for _, grad in used])[0]
    # Masking by multiplication and by selection differ where a row is not finite; the documented answer is NaN.
    unusable = ~lse.isfinite() & (case.targets != IGNORE)
    gradient = torch.where(unusable.unsqueeze(1), float("nan"), gradient)
    return Outcome(logprob.detach(), lse.detach(), gradient, None if entropy is None else entropy.detach())


def _long_double_truth(case: Case) -> Outcome:
    logits = case.logits.numpy().astype(np.longdouble)
    rows = np.arange(len(logits))
    kept = (case.targets != IGNORE).numpy()
    index = case.targets.masked_fill(case.targets == IGNORE, 0).numpy()
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        highest = logits.max(1, initial=-np.inf)
        shift = np.where(np.isinf(highest), 0, highest)
        total = np.exp(logits - shift[:, None]).sum(1)
        lse = shift + np.log(total)
        usable = np.isfinite(lse)
        log_p = np.where(usable[:, None], logits - lse[:, None], np.nan)
        p = np.exp(log_p)
        log_p = np.where(p > 0, log_p, np.where(np.isnan(p), np.nan, 0))
        entropy = -(p * log_p).sum(1)
        logprob = np.where(usable, logits[rows, index] - lse, np.nan)
        of_logprob, of_lse = case.grad_logprob.numpy(), case.grad_lse.numpy()
        of_entropy = np.zeros_like(of_lse) if case.grad_entropy is None else case.grad_entropy.numpy()
        gradient = (of_lse - of_logprob)[:, None] * p - of_entropy[:, None] * p * (log_p + entropy[:, None])
        gradient[rows, index] = np.where(
            usable,
            of_lse * p[rows, index]
            - of_logprob * np.expm1(logits[rows, index] - lse)
            - of_entropy * p[rows, index] * (log_p[rows, index] + entropy),
            np.nan,
        )
    results = [np.where(kept, part, 0) for part in (logprob, lse, entropy)]
    logprob64, lse64, entropy64 = (torch.from_numpy(part.astype(np.float64)) for part in results)
    grad64 = torch.from_numpy(np.where(kept[:, None], gradient, 0).astype(np.float64))
    return Outcome(logprob64, lse64, grad64, None if case.grad_entropy is None else entropy64)


def eager_of(case: Case) -> Outcome:
    """What plain torch makes of it in the dtype of the computation."""
    logits = case.logits.detach().to(accumulator(case.logits.dtype)).requires_grad_()
    ignored = case.targets == IGNORE
    clean = logits.masked_fill(ignored.unsqueeze(1), 0.0)
    index = case.targets.masked_fill(ignored, 0).unsqueeze(1)
    log_softmax = torch.log_softmax(clean, dim=1)
    logprob = log_softmax.gather(1, index).squeeze(1).masked_fill(ignored, 0.0)
    lse = torch.logsumexp(clean, dim=1).masked_fill(ignored, 0.0)
    outputs, grads = [logprob, lse], [case.grad_logprob, case.grad_lse.to(lse.dtype)]
    entropy = None
    if case.grad_entropy is not None:
        terms = log_softmax.exp() * log_softmax.masked_fill(log_softmax == -torch.inf, 0.0)
        entropy = -terms.sum(1).masked_fill(ignored, 0.0)
        outputs.append(entropy)
        grads.append(case.grad_entropy.to(lse.dtype))
    gradient = torch.autograd.grad(outputs, logits, grads)[0].to(case.logits.dtype)
    return Outcome(logprob.detach(), lse.detach(), gradient, None if entropy is None else entropy.detach())


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
    # The backward starts from a float64 lse and entropy: more than enough for the other dtypes, a rounding each for float64.
    rounding = torch.finfo(torch.float64).eps * truth.lse.abs() * (case.grad_logprob.abs() + case.grad_lse.abs())
    if case.grad_entropy is not None:
        assert fast.entropy is not None and eager.entropy is not None and truth.entropy is not None
        # E[x - max] / sum and log(sum) are rounded once each, in the accumulator's precision.
        summed = torch.finfo(accumulator(dtype)).eps * (truth.lse - case.logits.double().amax(1)).abs()
        _check(
            "entropy", fast.entropy, eager.entropy, truth.entropy, accumulator(dtype), 2 * summed.nan_to_num(0, 0, 0)
        )
        rounding = (
            rounding + torch.finfo(torch.float64).eps * (truth.lse.abs() + truth.entropy) * case.grad_entropy.abs()
        )
    else:
        assert fast.entropy is None
    _check("grad_logits", fast.grad_logits, eager.grad_logits, truth.grad_logits, dtype, rounding.unsqueeze(1))
