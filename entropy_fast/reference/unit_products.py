"""Gradients of one matrix for many units, as they are defined.

Legend: u a unit, l a column of coefficients, w_l(t) the coefficient of row t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["unit_products"]


def unit_products(
    left: Tensor, right: Tensor, scales: Tensor, runs: Sequence[tuple[int, int, int]], n_units: int
) -> Tensor:
    """[C, units, a, b]: Σ_t w_l(t) left[t] right[t]^T over the rows t of every unit, in fp64.

    Args:
        left: [rows * inner, a], ``inner`` positions for every row.
        right: [rows * inner, b].
        scales: [C, rows] w.
        runs: unit, first row and the one after the last.
        n_units: units.
    """
    inner = left.shape[0] // max(1, scales.shape[1])
    wide = scales.double().repeat_interleave(inner, 1)
    sums = left.new_zeros(len(scales), n_units, left.shape[1], right.shape[1], dtype=torch.float64)
    for unit, begin, end in runs:
        rows = slice(begin * inner, end * inner)
        sums[:, unit] += torch.einsum("lt,ta,tb->lab", wide[:, rows], left[rows].double(), right[rows].double())
    return sums
