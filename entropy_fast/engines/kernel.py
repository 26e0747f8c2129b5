"""The influence kernel between two stacks of units' gradients.

Legend: X_u gradient of unit u in a functional column, Y_u its preconditioned gradient in an update column, K_uw = X_u · Y_w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["kernel_of"]

# Elements whose products are added up in the accumulator's dtype; beyond that in fp64.
_COLUMNS = 4096


def kernel_of(x_stack: Sequence[Tensor], y_stack: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inner products of all units, and their diagonal by parameter.

    Args:
        x_stack: ``[units, *shape]`` X per parameter.
        y_stack: likewise Y.

    Returns:
        ``[units of x, units of y]`` K, and ``[parameters]`` every parameter's Σ_u K_uu (of as many units as both have), fp64 on
        the CPU.
    """
    kernel = torch.zeros(x_stack[0].shape[0], y_stack[0].shape[0], dtype=torch.float64)
    diagonals = torch.zeros(len(x_stack), dtype=torch.float64)
    for index, (x, y) in enumerate(zip(x_stack, y_stack, strict=True)):
        x, y = (t.reshape(len(t), t.shape[1:].numel()) for t in (x, y))
        whole = x.shape[1] // _COLUMNS * _COLUMNS
        found = (x[:, whole:].double() @ y[:, whole:].double().t()).cpu()
        if whole:
            left, right = (t[:, :whole].view(len(t), -1, _COLUMNS).transpose(0, 1) for t in (x, y))
            found += (left @ right.transpose(1, 2)).double().sum(0).cpu()
        kernel += found
        diagonals[index] = found.diagonal().sum()
    return kernel, diagonals
