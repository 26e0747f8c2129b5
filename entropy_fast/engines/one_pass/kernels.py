"""From gradients of units, or their products, to sums over influence kernels.

Legend: X_u gradient of unit u in a functional column, Y_u its preconditioned gradient in an update column, K_uw = X_u · Y_w.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from entropy_fast.distributed.layout import Layout
from entropy_fast.engines.gradient_sum import GradientSum, parameter_products
from entropy_fast.engines.sums import FinishedSums
from entropy_fast.estimates.kernel_sums import KernelSums

__all__ = ["products_of", "sums_of_dots", "sums_of_kernel"]


def products_of(
    layout: Layout, sums: FinishedSums, x_totals: Sequence[GradientSum], y_sums: Sequence[GradientSum]
) -> list[list[Tensor]]:
    """By update and functional, [parameters] X_sum · Y_sum; the first are there."""
    found = [
        [layout.of_all_parameters(parameter_products(x, y)) for x in x_totals[not which :]]
        for which, y in enumerate(y_sums)
    ]
    found[0].insert(0, sums.products)
    return found


def sums_of_dots(by_parameter: Tensor, dots: Tensor, products: Tensor, sizes: Tensor) -> KernelSums:
    """From [parameters] Σ_u K_uu, [units, 3] of every unit and [parameters] X_sum · Y_sum."""
    diagonal, row_sums, column_sums = (part.contiguous() for part in dots.unbind(1))
    return KernelSums(float(products.sum()), row_sums, column_sums, diagonal, sizes, None, products - by_parameter)


def sums_of_kernel(kernel: Tensor, diagonals: Tensor, sizes: Tensor, products: Tensor) -> KernelSums:
    """From K, every parameter's Σ_u K_uu, and [parameters] X_sum · Y_sum."""
    row_sums, column_sums, diagonal = kernel.sum(1), kernel.sum(0), kernel.diagonal().clone()
    return KernelSums(float(products.sum()), row_sums, column_sums, diagonal, sizes, kernel, products - diagonals)
