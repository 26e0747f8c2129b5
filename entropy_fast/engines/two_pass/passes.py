"""What the two-pass engine's passes give, and the kernel sums that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.columns import SequenceTable
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.estimates.kernel_sums import KernelSums

__all__ = ["Pass", "sums_of_dots"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """A gradient sum over a batch, and what was learned of its sequences."""

    total: GradientSum
    table: SequenceTable


def sums_of_dots(dots: Sequence[Tensor], products: Tensor, sizes: Tensor) -> KernelSums:
    """From [parameters, 3] X_u · Y_u, X_u · Y_sum and Y_u · X_sum of every unit, and X_sum · Y_sum by parameter."""
    of_units = torch.stack(list(dots))
    diagonal, row_sums, column_sums = (part.contiguous() for part in of_units.sum(1).unbind(1))
    by_parameter = products - of_units[:, :, 0].sum(0)
    return KernelSums(float(products.sum()), row_sums, column_sums, diagonal, sizes, by_parameter=by_parameter)
