"""Cases of unit_products as call files, and what the kernel made of them against the definition in float64."""

from __future__ import annotations

import dataclasses

import torch
from kernel_drivers import ELEMENT_TYPES, CallImage, CallResults, Place
from logprob_cases import accumulator
from torch import Tensor

from entropy_fast.reference import unit_products

Runs = list[tuple[int, int, int]]


@dataclasses.dataclass(frozen=True)
class UnitProductCase:
    """Signals of some rows, and whose rows they are; ``turned`` sums are [units, b, a]."""

    left: Tensor
    right: Tensor
    scales: Tensor
    runs: Runs
    sums: list[Tensor]
    turned: bool

    def expected(self) -> tuple[Tensor, Tensor]:
        """[labels, units, a, b] what the sums should be, and the size of the terms they are made of."""
        before = torch.stack([self.by_columns(total).double() for total in self.sums])
        added = unit_products(self.left, self.right, self.scales, self.runs, before.shape[1])
        size = unit_products(self.left.abs(), self.right.abs(), self.scales.abs(), self.runs, before.shape[1])
        return before + added, before.abs() + size

    def by_columns(self, total: Tensor) -> Tensor:
        return total.transpose(1, 2) if self.turned else total

    def assert_right(self, sums: list[Tensor]) -> None:
        """Each sum within the rounding of its terms, all of which are added in the accumulator."""
        expected, size = self.expected()
        found = torch.stack([self.by_columns(total).double() for total in sums])
        allowed = (self.left.shape[0] + 4) * torch.finfo(self.sums[0].dtype).eps * size
        assert ((found - expected).abs() <= allowed).all()


def unit_product_case(
    lengths: list[int],
    columns: tuple[int, int],
    dtype: torch.dtype,
    *,
    labels: int = 2,
    inner: int = 1,
    turned: bool = False,
    order: list[int] | None = None,
    seed: int = 0,
) -> UnitProductCase:
    """One run for each of ``lengths`` rows, of unit ``order[run]`` (the run's own number without)."""
    generator = torch.Generator().manual_seed(seed)
    units = order or list(range(len(lengths)))
    runs, begin = [], 0
    for unit, length in zip(units, lengths, strict=True):
        runs.append((unit, begin, begin + length))
        begin += length
    wide = accumulator(dtype)

    def random(*shape: int, of: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(of)

    shape = (max(units, default=0) + 1, *(columns[::-1] if turned else columns))
    return UnitProductCase(
        left=random(begin * inner, columns[0], of=dtype),
        right=random(begin * inner, columns[1], of=dtype),
        scales=random(labels, begin, of=wide),
        runs=runs,
        sums=[random(*shape, of=wide) for _ in range(labels)],
        turned=turned,
    )


@dataclasses.dataclass(frozen=True)
class UnitProductCalls:
    """One call in an image, and what it was called with."""

    case: UnitProductCase
    places: list[Place]

    def assert_right(self, results: CallResults) -> None:
        sums = zip(self.places, self.case.sums, strict=True)
        self.case.assert_right([results.tensor(place, total.dtype, *total.shape) for place, total in sums])


def unit_product_calls(case: UnitProductCase, image: CallImage) -> UnitProductCalls:
    """The call of the kernel for a case whose left factor is the narrow one, its runs sorted by unit."""
    places = [image.add(total) for total in case.sums]
    runs = torch.tensor(sorted(case.runs), dtype=torch.int64).view(-1, 3)
    tokens, narrow = case.left.shape
    wide = case.right.shape[1]
    rows = case.scales.shape[1]
    strides = case.by_columns(case.sums[0]).stride()
    image.call(
        "unit_products",
        image.add(case.left, misaligned_by=case.left.dtype.itemsize),
        *map(image.add, (case.right, case.scales, runs)),
        *[*places, None][:2],
        *(len(runs), narrow, wide, narrow, wide, rows, tokens // rows if rows else 1, *strides),
        ELEMENT_TYPES[case.left.dtype],
    )
    return UnitProductCalls(case, places)
