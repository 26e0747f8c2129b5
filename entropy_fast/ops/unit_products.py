"""Gradients of one matrix for many units at once: sums of outer products over the rows of each unit.

Legend: u a unit, l a column of coefficients, w_l(t) the coefficient of row t.

    sums_l[u] += Σ_{t in u} w_l(t) left[t] right[t]^T

Coefficients are applied in the accumulator (fp32, or fp64) and before any sum, since terms of different signs nearly cancel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.ops import native_backend
from entropy_fast.ops.backends import count_call, runs_natively
from entropy_fast.ops.registration import accumulator, described

__all__ = ["UnitRuns", "add_unit_products"]

# Elements of a matrix from which on products are added to its sums one by one: another pass over them would be felt.
_LARGE = 2**16
# Columns of the narrower factor up to which the compiled kernel is faster than a product by torch for every unit.
_NARROW = 32
# Sums that one call of the kernel adds to.
_AT_ONCE = 2


class UnitRuns:
    """Which rows belong to which unit, and what is derived from that once for all products.

    Args:
        runs: unit, first row and the one after the last, covering all rows in order.

    Attributes:
        runs: the same.
        rows: how many there are in all.
        units: one more than the last unit.

    Raises:
        ConfigError: a run does not begin where the one before it ended, ends before it begins, or is of a negative unit.
    """

    def __init__(self, runs: Sequence[tuple[int, int, int]]) -> None:
        self.runs = [tuple(map(int, run)) for run in runs]
        self.rows = self.units = 0
        for unit, begin, end in self.runs:
            if not (self.rows == begin <= end and unit >= 0):
                raise ConfigError(
                    f"UnitRuns got the run {(unit, begin, end)} where row {self.rows} comes next; expected the unit, that row "
                    "and the one after the run's last.",
                    fix="give runs in the order of their rows, without gaps.",
                )
            self.rows, self.units = end, max(self.units, unit + 1)
        self._spread: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.runs)

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether the runs are those of the units 0, 1, 2 and so on."""
        return [unit for unit, _, _ in self.runs] == list(range(len(self.runs)))

    @functools.cached_property
    def table(self) -> Tensor:
        """[n, 3] int64, units ascending."""
        return torch.tensor(sorted(self.runs), dtype=torch.int64).view(-1, 3)

    def spread(self, scales: Tensor, inner: int, columns: int) -> Tensor:
        """[rows * inner, C * columns]: the scales [C, rows] over what they multiply, made once for each shape."""
        key = (inner, columns, scales.dtype)
        if key not in self._spread:
            self._spread[key] = scales.t().repeat_interleave(columns, 1).repeat_interleave(inner, 0)
        return self._spread[key]


def add_unit_products(sums: Sequence[Tensor], left: Tensor, right: Tensor, scales: Tensor, runs: UnitRuns) -> None:
    """Add Σ_t scales_l[t] left[t] right[t]^T over the rows t of every unit.

    On the CPU a compiled kernel takes narrow factors; everything else are products by torch.
    ``entropy_fast.reference.unit_products`` says the same in three lines.

    Args:
        sums: [units, a, b] for every of C columns of coefficients, in fp32 or the dtype of the signals, whichever is wider.
        left: [rows * inner, a], ``inner`` positions for every row.
        right: [rows * inner, b]; in the same dtype, or where autocast left one of them wider, in another.
        scales: [C, rows] contiguous, on the same device, in the dtype of the sums. The same for all calls with ``runs``.
        runs: whose rows they are.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit.
    """
    _check_arguments(sums, left, right, scales, runs)
    # The factor with fewer columns takes the coefficients, and the other is read once.
    turned = right.shape[1] < left.shape[1]
    narrow, wide = (right, left) if turned else (left, right)
    if narrow.shape[1] <= _NARROW and _kernel_takes(sums, narrow, wide):
        views = [total.transpose(1, 2) if turned else total for total in sums]
        count_call("native", "unit_products")
        narrow, wide = _by_rows(narrow), _by_rows(wide)
        for first in range(0, len(views), _AT_ONCE):
            both = slice(first, first + _AT_ONCE)
            native_backend.unit_products(views[both], narrow, wide, scales[both], runs.table)
    else:
        _by_torch(sums, narrow, wide, scales, runs, turned=turned)


def _check_arguments(sums: Sequence[Tensor], left: Tensor, right: Tensor, scales: Tensor, runs: UnitRuns) -> None:
    factors = left.dim() == right.dim() == scales.dim() == 2 and left.shape[0] == right.shape[0]
    fits = (
        factors
        and left.is_floating_point()
        and right.is_floating_point()
        and left.device == right.device == scales.device
        and 0 < len(sums) == scales.shape[0]
        and scales.shape[1] == runs.rows
        and left.shape[0] % max(1, runs.rows) == 0
        and (runs.rows > 0 or left.shape[0] == 0)
        and scales.is_contiguous()
        and all(_takes_products(total, left, right, scales, runs.units) for total in sums)
    )
    if not fits:
        raise ConfigError(
            f"add_unit_products got {', '.join(map(described, (left, right, scales)))} (left, right, scales) and sums "
            f"{', '.join(map(described, sums)) or 'of no column'}, for {runs.rows} rows of {runs.units} units; expected "
            "[rows * inner, a], [rows * inner, b], contiguous [C, rows], and C times [units, a, b], scales and sums in fp32 or "
            "the factors' dtype, whichever is wider, on one device.",
            fix="pass one sum and one row of scales for every column of coefficients.",
        )


def _takes_products(total: Tensor, left: Tensor, right: Tensor, scales: Tensor, units: int) -> bool:
    return (
        total.dim() == 3
        and total.shape[0] >= units
        and total.shape[1:] == (left.shape[1], right.shape[1])
        and total.dtype == scales.dtype == torch.promote_types(accumulator(left), right.dtype)
        and total.device == left.device
    )


def _kernel_takes(sums: Sequence[Tensor], narrow: Tensor, wide: Tensor) -> bool:
    return (
        runs_natively(narrow.device)
        and wide.dtype == narrow.dtype
        and all(total.dtype == accumulator(narrow) and total.stride() == sums[0].stride() for total in sums)
    )


def _by_rows(signal: Tensor) -> Tensor:
    return signal if signal.stride(1) == 1 else signal.contiguous()


def _by_torch(
    sums: Sequence[Tensor], narrow: Tensor, wide: Tensor, scales: Tensor, runs: UnitRuns, *, turned: bool
) -> None:
    """One product for every unit, of all columns at once where the sums are small."""
    inner, columns = narrow.shape[0] // max(1, scales.shape[1]), narrow.shape[1]
    # [rows * inner, C * columns of narrow]
    scaled = torch.cat([narrow] * len(sums), 1).to(scales.dtype) * runs.spread(scales, inner, columns)
    if wide.dtype == torch.float16:
        # Coefficients can be smaller than its smallest number.
        wide = wide.float()
    # What rounding the products to 16 bits leaves goes along as a second factor.
    rounded = scaled.to(wide.dtype)
    if wide.dtype == torch.bfloat16:
        rounded = torch.cat([rounded, (scaled - rounded).to(wide.dtype)], 1)
    if wide.dtype == sums[0].dtype and sums[0][0].numel() >= _LARGE:
        for unit, begin, end in runs.runs:
            span = slice(begin * inner, end * inner)
            for place, total in enumerate(sums):
                own = rounded[span, place * columns : (place + 1) * columns]
                left, right = (wide[span], own) if turned else (own, wide[span])
                total[unit].addmm_(left.t(), right)
        return
    rounded = rounded.t()
    products = wide.new_empty(len(runs), rounded.shape[0], wide.shape[1])
    for place, (_, begin, end) in enumerate(runs.runs):
        span = slice(begin * inner, end * inner)
        torch.mm(rounded[:, span], wide[span], out=products[place])
    if rounded.shape[0] > scaled.shape[1]:
        products = products[:, : scaled.shape[1]].to(scaled.dtype) + products[:, scaled.shape[1] :]
    for place, total in enumerate(sums):
        found = products[:, place * columns : (place + 1) * columns]
        if turned:
            found = found.transpose(1, 2)
        if runs.in_order and len(runs) == len(total):
            total.add_(found)
        else:
            for (unit, _, _), one in zip(runs.runs, found, strict=True):
                total[unit].add_(one)
