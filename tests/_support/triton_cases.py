"""Inputs for the Triton kernels that start from hidden states or fold gradients, and how their results are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from logprob_cases import IGNORE, accumulator
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
class LinearCase:
    """One call of linear_token_logprobs."""

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


def linear_truth(case: LinearCase) -> LinearTokenLogprobs:
    """In NumPy's long double, from the very numbers of the case."""
    kept = (case.targets != IGNORE).numpy()
    hidden, weight = (part.double().numpy().astype(np.longdouble) for part in (case.hidden, case.weight))
    hidden, target = hidden[kept], case.targets.numpy()[kept]
    rows = np.arange(len(hidden))
    logits = hidden @ weight.T
    if case.bias is not None:
        logits = logits + case.bias.double().numpy()
    slope = np.ones_like(logits)
    if case.softcap is not None:
        tanh = np.tanh(logits / case.softcap)
        logits, slope = case.softcap * tanh, 1 - tanh**2
    shift = logits.max(1, initial=-np.inf, keepdims=True)
    terms = np.exp(logits - shift)
    total = terms.sum(1, keepdims=True)
    log_p = logits - shift - np.log(total)
    p = terms / total
    finite_log_p = np.where(p > 0, log_p, 0)
    entropy = -(p * finite_log_p).sum(1, keepdims=True)
    one_hot = np.zeros_like(p)
    one_hot[rows, target] = 1
    # 1 - p of the target as the sum of the others.
    rest = (p * (1 - one_hot)).sum(1, keepdims=True)
    unit_logprob = ((one_hot * rest - (1 - one_hot) * p) * slope) @ weight
    unit_entropy = -(p * (finite_log_p + entropy) * slope) @ weight

    def spread(values: np.ndarray) -> Tensor:
        whole = np.zeros((len(kept), *values.shape[1:]))
        whole[kept] = values.astype(np.float64)
        return torch.from_numpy(whole)

    lse = (shift + np.log(total))[:, 0]
    return LinearTokenLogprobs(
        spread(log_p[rows, target]), spread(lse), spread(entropy[:, 0]), spread(unit_logprob), spread(unit_entropy)
    )


def assert_linear_right(fast: LinearTokenLogprobs, case: LinearCase) -> None:
    """Eager is the reference in the dtype of the hidden states."""
    dtype = case.hidden.dtype
    wide = accumulator(dtype)
    truth = linear_truth(case)
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
            # Exact in float32, and not in fewer bits.
            "bias_correction": [1.0 + (0.375 + 2.0**-12) * index for index in count],
            "eps": [2.0**-27 * (1 + index) for index in count],
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


# Rounding errors of different elements are independent and of mean 0, so that their sum stays within SIGMAS root sums of
# squares but for a probability of 2 exp(-SIGMAS²/2) = 3e-14 (Hoeffding), 1e-10 for all the dots of a run.
SIGMAS = 8
# Roundings in float64 on a term's way into a dot: its product, 8 additions in a lane of a chunk (of 8 times 1024 elements),
# 10 over lanes, 1 for every 512 chunks and 9 over those.
IN_FLOAT64 = 29


def assert_fold_right(fast: FoldCase, dots: Tensor, before: FoldCase, update: bool = True) -> None:
    """``fast`` is ``before`` after the call that returned ``dots``; errors are bounded by the number of roundings."""
    # x is multiplied once. y: product and root (which halves its relative error), root, sum, quotient, product; the quotient
    # of a GPU is off by two units in the last place. Each once more, as far as they differ from one tensor to the next only:
    # x_scale in the dtype of the sums, and g_scale · ratio. (The other factors are exact: see FoldCase.factors.)
    of_x, of_y = (1.0,), (0.5, 1.0, 1.0, 4.0 if fast.x_sum[0].is_cuda else 1.0, 1.0)
    fast = fast.to("cpu")
    truth, y = before.cast(torch.float64), before.cast(torch.float64)
    reference.precondition_accumulate(
        truth.x, truth.g, truth.v, truth.x_sum, truth.y_sum, update=update, **truth.factors()
    )
    for total in (*y.x_sum, *y.y_sum):
        total.zero_()
    reference.precondition_accumulate(y.x, y.g, y.v, y.x_sum, y.y_sum, **y.factors())
    for index, own in enumerate(dots.cpu()):
        x_own, y_own, dtype = y.x_sum[index], y.y_sum[index], fast.x_sum[index].dtype
        # What float64 is held to is rounded as often.
        unit = torch.finfo(dtype).eps / 2 * (2 if dtype == torch.float64 else 1)
        for name, alone, roundings in (("x_sum", x_own, of_x), ("y_sum", y_own, of_y)):
            found, expected = getattr(fast, name)[index], getattr(truth, name)[index]
            assert found.shape == expected.shape and found.dtype == getattr(before, name)[index].dtype
            allowed = update * unit * ((sum(roundings) + 1) * alone.abs() + expected.abs())
            assert ((found.double() - expected).abs() <= allowed).all(), f"{name}[{index}]"
        pairs = (
            (x_own, y_own, of_x + of_y, 2),
            (x_own, before.y_sum[index].double(), of_x, 1),
            (y_own, before.x_sum[index].double(), of_y, 1),
        )
        for number, (one, other, roundings, common) in zip(own.tolist(), pairs, strict=True):
            terms = one * other
            expected = math.fsum(terms.tolist())
            alike = SIGMAS * math.hypot(*roundings) * float(terms.norm()) + common * abs(expected)
            allowed = unit * alike + IN_FLOAT64 * torch.finfo(torch.float64).eps / 2 * float(terms.abs().sum())
            assert abs(number - expected) <= allowed, f"dots[{index}] {own}: {number}, the truth is {expected}"
