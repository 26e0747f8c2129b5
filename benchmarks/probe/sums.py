"""What every way to a forecast has to give: numbers from the influence kernel K (docs/theory.md)."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sums:
    """X_sum · Y_sum and sums of K, fp64.

    Attributes:
        x_dot_y: X_sum · Y_sum.
        diagonal: [B] K_nn; empty for two batches.
        row_sums: [B] X_n · Y_sum.
        column_sums: [B] Y_m · X_sum.
    """

    x_dot_y: float
    diagonal: Tensor
    row_sums: Tensor
    column_sums: Tensor
