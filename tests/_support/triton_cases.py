"""How results of the Triton kernels are judged where there is an entropy, or hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from logprob_cases import IGNORE, Case, accumulator
from torch import Tensor

from entropy_fast import reference
from entropy_fast.reference import LinearTokenLogprobs


def assert_close_enough(name: str, fast: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """|fast - truth| <= 2 |eager - truth| + 4 units in the last place, for each element; NaN and inf must match."""
    fast, eager = fast.double(), eager.double()
    assert fast.shape == truth.shape, f"{name}: shape {tuple(fast.shape)}, expected {tuple(truth.shape)}"
    finite = torch.isfinite(truth)
    wrong_kind = ~finite & ~torch.isclose(fast, truth, equal_nan=True)
    assert not wrong_kind.any(), f"{name}: {fast[wrong_kind][:5]} where the truth is {truth[wrong_kind][:5]}"
    fast, eager, truth = fast[finite], eager[finite], truth[finite]
    eager_error = torch.nan_to_num((eager - truth).abs(), nan=0.0, posinf=0.0)
    tolerance = 4 * torch.finfo(dtype).eps * truth.abs() + 4 * torch.finfo(accumulator(dtype)).eps
    excess = (fast - truth).abs() - 2 * eager_error - tolerance - torch.finfo(dtype).smallest_normal
    assert not (~(excess <= 0)).any(), f"{name}: off by {(fast - truth).abs().max()}, too much by {excess.max()}"


def assert_rows_close_enough(name: str, fast: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The same for the length of each row: an element of a matrix product can be right by chance."""
    usable = truth.isfinite().all(dim=1)
    assert fast[~usable].isnan().all(), f"{name}: numbers in a row that has none"
    fast, eager, truth = (part[usable].double() for part in (fast, eager, truth))
    eager_error = torch.nan_to_num((eager - truth).norm(dim=1), nan=0.0, posinf=0.0)
    tolerance = 4 * torch.finfo(dtype).eps * truth.norm(dim=1) + 4 * torch.finfo(accumulator(dtype)).eps
    excess = (fast - truth).norm(dim=1) - 2 * eager_error - tolerance
    assert not (~(excess <= 0)).any(), f"{name}: too much by {excess.max()}, rows are {truth.norm(dim=1).max()} long"


@dataclass(frozen=True)
class EntropyOutcome:
    """What an implementation makes of a case when asked for the entropy too."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    grad_logits: Tensor


def grad_entropy_of(case: Case) -> Tensor:
    return torch.randn(len(case.targets), generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _with_entropy(case: Case, dtype: torch.dtype) -> EntropyOutcome:
    """By torch's own functions and autograd, in ``dtype``."""
    logits = case.logits.detach().to(dtype).requires_grad_()
    ignored = case.targets == IGNORE
    clean = logits.masked_fill(ignored.unsqueeze(1), 0.0)
    index = case.targets.masked_fill(ignored, 0).unsqueeze(1)
    log_softmax = torch.log_softmax(clean, dim=1)
    logprob = log_softmax.gather(1, index).squeeze(1).masked_fill(ignored, 0.0)
    lse = torch.logsumexp(clean, dim=1).masked_fill(ignored, 0.0)
    unusable = ~lse.isfinite()
    terms = log_softmax.exp() * log_softmax.masked_fill(log_softmax == -torch.inf, 0.0)
    entropy = -terms.sum(1).masked_fill(ignored, 0.0).masked_fill(unusable, torch.nan)
    grads = [case.grad_logprob.to(dtype), case.grad_lse.to(dtype), grad_entropy_of(case).to(dtype)]
    gradient = torch.autograd.grad([logprob, lse, entropy], logits, grads)[0]
    gradient = torch.where(unusable.unsqueeze(1), torch.nan, gradient)
    return EntropyOutcome(logprob.detach(), lse.detach(), entropy.detach(), gradient)


def assert_entropy_right(fast: EntropyOutcome, case: Case) -> None:
    dtype = case.logits.dtype
    wide = accumulator(dtype)
    truth, eager = _with_entropy(case, torch.float64), _with_entropy(case, wide)
    assert fast.entropy.dtype == torch.float64
    assert fast.grad_logits.dtype == dtype
    for name in ("logprob", "lse", "entropy"):
        assert_close_enough(name, getattr(fast, name), getattr(eager, name), getattr(truth, name), wide)
    # The backward starts from lse and entropy: more than enough for the other dtypes, one rounding of them for float64.
    at_least = eager.grad_logits.to(dtype).double() - truth.grad_logits
    upstream = case.grad_logprob.double().abs() + case.grad_lse.abs() + grad_entropy_of(case).abs()
    rounding = torch.finfo(torch.float64).eps * truth.lse.abs() * upstream
    allowed = truth.grad_logits + torch.maximum(at_least.abs(), rounding.unsqueeze(1))
    assert_close_enough("grad_logits", fast.grad_logits, allowed, truth.grad_logits, dtype)


@dataclass(frozen=True)
class LinearCase:
    """One call of linear_token_logprobs; ``hidden`` and ``weight`` are what the truth is computed from, too."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def options(self) -> dict[str, object]:
        return {"softcap": self.softcap, "want_entropy": True, "unit_gradients": True, "ignore_index": IGNORE}


def make_linear_case(
    rows: int,
    vocabulary: int,
    units: int,
    dtype: torch.dtype,
    *,
    scale: float = 3.0,
    bias: float | None = None,
    softcap: float | None = None,
    masked: float = 0.2,
    likely: bool = False,
) -> LinearCase:
    """Logits of standard deviation ``scale`` around ``bias``; with ``likely``, every target has p within 1e-6 of 1."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, units, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, units, generator=generator, dtype=torch.float64) * scale / units**0.5
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    if likely:
        needed = torch.as_tensor(vocabulary).double().log() + 16.0
        for row, target in enumerate(targets.tolist()):
            direction = weight[target] / weight[target].square().sum()
            highest = (hidden[row] @ weight.t()).max()
            hidden[row] += direction * (highest + needed + scale**2 - hidden[row] @ weight[target])
    targets[torch.rand(rows, generator=generator) < masked] = IGNORE
    shift = None
    if bias is not None:
        shift = (torch.randn(vocabulary, generator=generator, dtype=torch.float64) + bias).to(dtype)
    return LinearCase(hidden.to(dtype), weight.to(dtype), targets, shift, softcap)


def assert_linear_right(fast: LinearTokenLogprobs, case: LinearCase) -> None:
    """Eager is the reference in the dtype of the hidden states; the truth is it in float64, on the same numbers."""
    dtype = case.hidden.dtype
    wide = accumulator(dtype)
    bias = None if case.bias is None else case.bias.double()
    truth = reference.linear_token_logprobs(
        case.hidden.double(), case.weight.double(), case.targets, bias=bias, **case.options()
    )
    eager = reference.linear_token_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, **case.options())
    assert (fast.logprob.dtype, fast.lse.dtype) == (wide, torch.float64)
    for name in ("logprob", "lse", "entropy"):
        assert_close_enough(name, getattr(fast, name), getattr(eager, name), getattr(truth, name), wide)
    for name in ("unit_logprob", "unit_entropy"):
        unit = getattr(fast, name)
        assert unit.dtype == wide
        assert_rows_close_enough(name, unit, getattr(eager, name), getattr(truth, name), dtype)


@dataclass(frozen=True)
class FoldCase:
    """One call of precondition_accumulate: lists of tensors, and factors for each."""

    x: Sequence[Tensor]
    g: Sequence[Tensor]
    v: Sequence[Tensor | None]
    x_sum: Sequence[Tensor]
    y_sum: Sequence[Tensor]

    def factors(self) -> dict[str, object]:
        count = range(len(self.x))
        return {
            "bias_correction": [1.0 + 0.37 * index for index in count],
            "eps": [1e-8 * (1 + index) for index in count],
            "ratio": [1.0 / (1 + index) for index in count],
            "x_scale": 0.7,
            "g_scale": -1.3,
        }

    def cast(self, dtype: torch.dtype) -> FoldCase:
        """New tensors with the same numbers."""
        lists = ([None if t is None else t.to(dtype, copy=True) for t in part] for part in vars(self).values())
        return FoldCase(*lists)

    def to(self, device: str) -> FoldCase:
        lists = ([None if t is None else t.to(device) for t in part] for part in vars(self).values())
        return FoldCase(*lists)

    def clone(self) -> FoldCase:
        lists = ([None if t is None else t.clone() for t in part] for part in vars(self).values())
        return FoldCase(*lists)


def make_fold_case(kinds: Sequence[tuple[torch.dtype, torch.dtype | None]], sizes: Sequence[int]) -> FoldCase:
    """One tensor of each size for each kind (dtype of the gradients, of v or None); some v are 0. Odd ones lie unaligned."""
    generator = torch.Generator().manual_seed(len(sizes))
    parts: list[list[Tensor | None]] = [[], [], [], [], []]
    for gradient, moment in kinds:
        wide = torch.promote_types(gradient, torch.float32)
        for size in sizes:
            drawn = [torch.randn(size + 1, generator=generator, dtype=torch.float64) for _ in range(5)]
            drawn[2] = drawn[2].square() * (torch.rand(size + 1, generator=generator) > 0.1)
            dtypes = (gradient, gradient, moment, wide, wide)
            for part, values, dtype in zip(parts, drawn, dtypes, strict=True):
                part.append(None if dtype is None else values.to(dtype)[size % 2 :][:size])
    return FoldCase(*parts)


def assert_fold_right(fast: FoldCase, dots: Tensor, before: FoldCase, update: bool = True) -> None:
    """``fast`` is ``before`` after the call that returned ``dots``."""
    fast = fast.to("cpu")
    truth, eager = before.cast(torch.float64), before.clone()
    results = [
        reference.precondition_accumulate(c.x, c.g, c.v, c.x_sum, c.y_sum, update=update, **c.factors())
        for c in (truth, eager)
    ]
    for index, sums in enumerate(zip(fast.x_sum, eager.x_sum, truth.x_sum, strict=True)):
        assert_close_enough(f"x_sum[{index}]", *sums, sums[0].dtype)
    for index, sums in enumerate(zip(fast.y_sum, eager.y_sum, truth.y_sum, strict=True)):
        assert_close_enough(f"y_sum[{index}]", *sums, sums[0].dtype)
    for index, (own, of_eager, of_truth) in enumerate(zip(dots.cpu(), *reversed(results), strict=True)):
        # Rounding of y, in the dtype of the sums, is what limits a dot: relative to the sum of the sizes of its terms.
        sums_of = truth.x[index].numel() ** 0.5 * torch.finfo(fast.x_sum[index].dtype).eps
        excess = (own - of_truth).abs() - 2 * (of_eager - of_truth).abs() - 8 * sums_of - 1e-12 * of_truth.abs()
        assert (excess <= 0).all(), f"dots[{index}] {own}, the truth is {of_truth}"
