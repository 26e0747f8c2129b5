"""Cases of the ops as call files, and what the kernels made of them against the references in float64."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from kernel_drivers import ELEMENT_TYPES, CallImage, CallResults, Place
from logprob_cases import IGNORE, Case, Outcome, accumulator
from torch import Tensor

from entropy_fast import reference
from entropy_fast.ops.accumulation_table import CHUNK, kind_of


def size_of_rows(rows: int, width: int, row_stride: int) -> int:
    """Elements from the first of the first row to the last of the last."""
    return (rows - 1) * row_stride + width if rows else 0


def rows_apart(values: Tensor, row_stride: int) -> Tensor:
    """The rows so many elements apart, with poison between them and nothing after the last."""
    rows, width = values.shape
    storage = torch.full((rows, row_stride * values.dtype.itemsize), 0xFF, dtype=torch.uint8).view(values.dtype)
    storage[:, :width] = values
    return storage.flatten()[: size_of_rows(rows, width, row_stride)]


@dataclasses.dataclass(frozen=True)
class LogprobCalls:
    """One case of token_logprobs in an image: forward, then backward."""

    image: CallImage
    case: Case
    logprob: Place
    lse: Place
    entropy: Place | None
    grad_logits: Place
    grad_row_stride: int
    in_place: bool

    def outcome(self, results: CallResults) -> Outcome:
        rows, vocabulary = self.case.logits.shape
        dtype = self.case.logits.dtype
        grads = results.tensor(self.grad_logits, dtype, rows, self.grad_row_stride)
        untouched = grads[:, vocabulary:].contiguous().view(torch.uint8)
        assert (untouched == 0xFF).all(), "written between the rows"
        lse = results.tensor(self.lse, torch.float64, rows)
        entropy = None if self.entropy is None else results.tensor(self.entropy, torch.float64, rows)
        return Outcome(
            results.tensor(self.logprob, accumulator(dtype), rows), lse, grads[:, :vocabulary].contiguous(), entropy
        )


def logprob_calls(
    case: Case, image: CallImage | None = None, *, in_place: bool = False, misaligned: bool = False
) -> LogprobCalls:
    """The case's two calls; ``misaligned`` puts every row of the logits an element off an address that vectors like."""
    image = CallImage() if image is None else image
    rows, vocabulary = case.logits.shape
    dtype = case.logits.dtype
    stride = max(case.logits.stride(0), vocabulary)
    logits = image.add(rows_apart(case.logits, stride), misaligned_by=dtype.itemsize if misaligned else 0)
    targets, grad_logprob, grad_lse = map(image.add, (case.targets, case.grad_logprob, case.grad_lse))
    logprob = image.poison(rows * accumulator(dtype).itemsize)
    lse = image.poison(rows * 8)
    entropy = grad_entropy = None
    if case.grad_entropy is not None:
        entropy, grad_entropy = image.poison(rows * 8), image.add(case.grad_entropy)
    grad_row_stride = stride if in_place else vocabulary + 3
    grads = logits if in_place else image.poison(size_of_rows(rows, vocabulary, grad_row_stride) * dtype.itemsize)
    shape, last = (rows, vocabulary, stride), (IGNORE, ELEMENT_TYPES[dtype])
    image.call("token_logprobs_forward", logits, targets, logprob, lse, entropy, *shape, *last)
    upstream = (grad_logprob, grad_lse, grad_entropy)
    image.call(
        "token_logprobs_backward", logits, targets, lse, entropy, *upstream, grads, *shape, grad_row_stride, *last
    )
    return LogprobCalls(image, case, logprob, lse, entropy, grads, grad_row_stride, in_place)


@dataclasses.dataclass(frozen=True)
class AccumulateCase:
    """Tensors of one call of precondition_accumulate, one list entry each."""

    x: list[Tensor]
    g: list[Tensor]
    v: list[Tensor | None]
    x_sum: list[Tensor]
    y_sum: list[Tensor]
    factors: list[tuple[float, float, float]]
    x_scale: float = 0.75
    g_scale: float = -1.5
    update: bool = True


# Gradients and second moments of each kind in the table.
KINDS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
)
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3, 2 * CHUNK + 77)


def accumulate_case(
    sizes: tuple[int, ...] = SIZES,
    kinds: tuple[tuple[torch.dtype, torch.dtype], ...] = KINDS,
    *,
    update: bool = True,
    seed: int = 0,
) -> AccumulateCase:
    """Every size in every kind; every fourth tensor has no v, and a third of each other v is 0."""
    generator = torch.Generator().manual_seed(seed)
    case = AccumulateCase([], [], [], [], [], [], update=update)
    for index, (size, (gradient, moment)) in enumerate(itertools.product(sizes, kinds)):
        wide = torch.randn(5, size, generator=generator, dtype=torch.float64)
        v = wide[2].square()
        v[torch.rand(size, generator=generator) < 0.3] = 0.0
        sums = torch.promote_types(gradient, torch.float32)
        case.x.append(wide[0].to(gradient))
        case.g.append(wide[1].to(gradient))
        case.v.append(None if index % 4 == 3 else v.to(moment))
        case.x_sum.append(wide[3].to(sums))
        case.y_sum.append(wide[4].to(sums))
        case.factors.append((1.0 + index / 7, 10.0 ** -(4 + index % 5), 0.5 + index / 3))
    return case


@dataclasses.dataclass(frozen=True)
class AccumulateCalls:
    """One call of precondition_accumulate in an image."""

    image: CallImage
    case: AccumulateCase
    x_sum: list[Place]
    y_sum: list[Place]
    dots: Place

    def outcome(self, results: CallResults) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        sums = [
            [results.tensor(place, t.dtype, *t.shape) for place, t in zip(places, tensors, strict=True)]
            for places, tensors in ((self.x_sum, self.case.x_sum), (self.y_sum, self.case.y_sum))
        ]
        return results.tensor(self.dots, torch.float64, len(self.case.x), 3), *sums


def accumulate_calls(
    case: AccumulateCase, image: CallImage | None = None, *, misaligned: bool = False
) -> AccumulateCalls:
    """The case's one call; ``misaligned`` puts every other array an element off an address that vectors like."""
    image = CallImage() if image is None else image
    entries, pointers, owners = [], [], []
    for index, (x, v) in enumerate(zip(case.x, case.v, strict=True)):
        places = []
        for part, tensor in enumerate((x, case.g[index], v, case.x_sum[index], case.y_sum[index])):
            shift = tensor.dtype.itemsize if tensor is not None and misaligned and (index + part) % 2 else 0
            places.append(None if tensor is None else image.add(tensor, misaligned_by=shift))
        pointers.append(places)
        kind = kind_of(x.dtype, torch.float32 if v is None else v.dtype).number
        entries.append([0] * 5 + [x.numel(), len(owners), kind])
        owners += [index] * -(-x.numel() // CHUNK)
    table = image.add(torch.tensor(entries, dtype=torch.int64).reshape(-1, 8))
    for index, places in enumerate(pointers):
        for part, place in enumerate(places):
            if place is not None:
                image.point(Place(table.blob, 64 * index + 8 * part), place)
    factors = image.add(torch.tensor(case.factors, dtype=torch.float64))
    owner = image.add(torch.tensor(owners, dtype=torch.int32))
    partial, dots = image.poison(24 * len(owners)), image.poison(24 * len(case.x))
    scalars = (case.x_scale, case.g_scale, case.update)
    image.call("precondition_accumulate", table, factors, owner, partial, dots, len(case.x), len(owners), *scalars)
    return AccumulateCalls(image, case, [p[3] for p in pointers], [p[4] for p in pointers], dots)


def assert_accumulated(dots: Tensor, x_sum: list[Tensor], y_sum: list[Tensor], case: AccumulateCase) -> None:
    """Against the reference in float64 on the same numbers: a few roundings of each term in the sums' own dtype."""
    terms_x, terms_y = ([torch.zeros(t.shape, dtype=torch.float64) for t in case.x] for _ in range(2))
    bias_correction, eps, ratio = ([row[column] for row in case.factors] for column in range(3))
    reference.precondition_accumulate(
        [t.double() for t in case.x],
        [t.double() for t in case.g],
        [None if t is None else t.double() for t in case.v],
        terms_x,
        terms_y,
        bias_correction=bias_correction,
        eps=eps,
        ratio=ratio,
        x_scale=case.x_scale,
        g_scale=case.g_scale,
    )
    for index, (before_x, before_y) in enumerate(zip(case.x_sum, case.y_sum, strict=True)):
        rounding = torch.finfo(before_x.dtype).eps
        x, y = terms_x[index], terms_y[index]
        for name, got, before, term in (("X", x_sum[index], before_x, x), ("Y", y_sum[index], before_y, y)):
            if case.update:
                allowed = rounding * (4 * term.abs() + before.double().abs())
                excess = (got.double() - (before.double() + term)).abs() - allowed
                assert not (~(excess <= 0)).any(), f"tensor {index}: {name}_sum is off by {excess.max()} too much"
            else:
                assert torch.equal(got, before), f"tensor {index}: {name}_sum was changed"
        # Every product carries the roundings of its factors; a sum of n of them in float64 no more than n of its own.
        for column, (a, b) in enumerate(((x, y), (x, before_y.double()), (y, before_x.double()))):
            products = a * b
            allowed = float(products.abs().sum()) * (6 * rounding + len(a) * torch.finfo(torch.float64).eps)
            error = abs(float(dots[index, column] - products.sum()))
            assert error <= allowed, f"tensor {index}, dot {column}: off by {error}, allowed {allowed}"


FIRST_TOKEN = 40
STATE_FIELDS = ("highest", "sum", "rest", "weighted", "at_target", "center", "factor", "center_shift")


@dataclasses.dataclass(frozen=True)
class SoftmaxCalls:
    """One call of softmax_block, the first of each row, in an image."""

    values: Tensor
    targets: Tensor
    softcap: float
    logits: Place
    entropy_weights: Place
    state: Place
    row_stride: int
    weights: bool
    entropy: bool


def softmax_calls(
    dtype: torch.dtype,
    softcap: float,
    image: CallImage,
    *,
    rows: int = 4,
    width: int = 1035,
    weights: bool = True,
    entropy: bool = True,
) -> SoftmaxCalls:
    """Random logits; the targets of the first two rows are in the block, those of the others before and after it."""
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 4
    values = (softcap * torch.tanh(values / softcap) if softcap else values).to(dtype)
    row_stride = width + 5
    targets = torch.tensor([FIRST_TOKEN, FIRST_TOKEN + width - 1, 0, FIRST_TOKEN + width])[:rows]
    state = torch.zeros(rows, len(STATE_FIELDS), dtype=torch.float64)
    state[:, STATE_FIELDS.index("highest")] = -torch.inf
    state[:, STATE_FIELDS.index("at_target")] = torch.nan
    places = [image.add(part) for part in (rows_apart(values, row_stride), targets, state)]
    of_entropy = image.poison(size_of_rows(rows, width, row_stride) * dtype.itemsize)
    last = (rows, width, row_stride, FIRST_TOKEN, softcap, weights, ELEMENT_TYPES[dtype])
    image.call("softmax_block", places[0], of_entropy if entropy else None, places[1], places[2], *last)
    return SoftmaxCalls(values, targets, softcap, places[0], of_entropy, places[2], row_stride, weights, entropy)


def assert_softmax_block(calls: SoftmaxCalls, results: CallResults) -> None:
    """State and weights are those of csrc/softmax_block.h, in float64 on the same logits, but for a few roundings."""
    rows, width = calls.values.shape
    dtype = calls.values.dtype
    state = dict(zip(STATE_FIELDS, results.tensor(calls.state, torch.float64, rows, len(STATE_FIELDS)).T, strict=True))
    z = calls.values.double()
    column = calls.targets - FIRST_TOKEN
    here = (column >= 0) & (column < width)
    at_target = torch.zeros_like(z, dtype=torch.bool)
    at_target[here, column[here]] = True
    difference = z - state["highest"].unsqueeze(1)
    term = difference.exp()
    derivative = 1 - (z / calls.softcap) ** 2 if calls.softcap else torch.ones_like(z)
    weight = (term * derivative).masked_fill(at_target, 0.0)
    close = {"rtol": 64 * torch.finfo(accumulator(dtype)).eps, "atol": 0.0}
    assert torch.equal(state["at_target"][here], z[at_target])
    torch.testing.assert_close(state["sum"], term.sum(1), **close)
    torch.testing.assert_close(state["rest"], term.masked_fill(at_target, 0.0).sum(1), **close)
    torch.testing.assert_close(state["weighted"], (term * difference).sum(1), **close)
    center = state["highest"] + state["weighted"] / state["sum"] if calls.entropy else torch.zeros(rows).double()
    torch.testing.assert_close(state["center"], center, **close)
    if not calls.weights:
        assert torch.equal(results.tensor(calls.logits, dtype, rows, calls.row_stride)[:, :width], calls.values)
    expected = (weight, weight * (z - center.unsqueeze(1)))
    wanted = (calls.weights, calls.entropy)
    for place, truth, written in zip((calls.logits, calls.entropy_weights), expected, wanted, strict=True):
        if not written:
            continue
        got = results.tensor(place, dtype, rows, calls.row_stride)
        assert (got[:, width:].contiguous().view(torch.uint8) == 0xFF).all(), "written between the rows"
        # z - center is rounded to the size of either.
        size = truth.abs() + (weight * center.unsqueeze(1)).abs()
        allowed = 4 * torch.finfo(dtype).eps * truth.abs() + 16 * torch.finfo(accumulator(dtype)).eps * size
        allowed += torch.finfo(dtype).smallest_normal
        excess = (got[:, :width].double() - truth).abs() - allowed
        assert not (~(excess <= 0)).any(), f"{dtype}: a weight is off by {excess.max()} too much"
