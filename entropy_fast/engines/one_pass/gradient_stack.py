"""Every unit's gradients kept side by side, and the influence kernel between two such stacks.

Legend: X_u gradient of unit u in a functional column, Y_u its preconditioned gradient in an update column, K_uw = X_u · Y_w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.capture import GradientRecorder

__all__ = ["GradientStack", "kernel_of"]

# Elements whose products are added up in the accumulator's dtype; beyond that in fp64.
_COLUMNS = 4096


class GradientStack:
    """Gradients of all units in every column, ``[units, *shape]`` per parameter, in fp32 or the parameter's dtype if wider.

    Args:
        names: of the parameters.
        parameters: in the same order.
        n_units: how many.
        n_columns: how many columns.
        on_cpu: whether it is kept on the CPU instead of the parameters' devices.

    Attributes:
        columns: for every column one tensor per parameter.
        touched: whether a signal ever arrived, per parameter.
    """

    def __init__(
        self, names: Sequence[str], parameters: Sequence[Tensor], n_units: int, n_columns: int, *, on_cpu: bool
    ) -> None:
        self._names = list(names)
        self._direct = not on_cpu or all(p.device.type == "cpu" for p in parameters)
        self._used: set[int] = set()
        self.touched = [False] * len(names)
        self.columns = [
            [
                torch.zeros(
                    (n_units, *p.shape),
                    dtype=torch.promote_types(p.dtype, torch.float32),
                    device="cpu" if on_cpu else p.device,
                )
                for p in parameters
            ]
            for _ in range(n_columns)
        ]

    @staticmethod
    def bytes_of(parameters: Sequence[Tensor], n_units: int, n_columns: int) -> int:
        """What a stack takes."""
        return n_columns * n_units * sum(p.numel() * max(4, p.element_size()) for p in parameters)

    def storage(self, numbers: list[int]) -> Mapping[str, Sequence[Tensor]]:
        """By parameter name, zeroed views of the given units (successive ones) for `GradientRecorder`."""
        if not self._direct:
            return {}
        span = slice(numbers[0], numbers[-1] + 1)
        if self._used & set(numbers):
            for stack in self.columns:
                for tensor in stack:
                    tensor[span].zero_()
        self._used |= set(numbers)
        return {name: [stack[index][span] for stack in self.columns] for index, name in enumerate(self._names)}

    def collect(self, numbers: list[int], gradients: GradientRecorder) -> None:
        """Note what a group of units brought, and copy it where it is not here yet."""
        for index, name in enumerate(self._names):
            if name not in gradients.touched:
                continue
            self.touched[index] = True
            if not self._direct:
                for stack, found in zip(self.columns, gradients.columns, strict=True):
                    stack[index][numbers[0] : numbers[-1] + 1] = found[name].to(stack[index].device)

    def clear(self) -> None:
        """Back to empty."""
        for stack in self.columns:
            for tensor in stack:
                tensor.zero_()
        self._used.clear()
        self.touched[:] = [False] * len(self.touched)


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
        x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
        whole = x.shape[1] // _COLUMNS * _COLUMNS
        found = (x[:, whole:].double() @ y[:, whole:].double().t()).cpu()
        if whole:
            left, right = (t[:, :whole].view(len(t), -1, _COLUMNS).transpose(0, 1) for t in (x, y))
            found += (left @ right.transpose(1, 2)).double().sum(0).cpu()
        kernel += found
        diagonals[index] = found.diagonal().sum()
    return kernel, diagonals
