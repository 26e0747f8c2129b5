"""Every unit's gradients kept side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.capture import GradientRecorder
from entropy_fast.resuming.held import flags_of, refuse_other_form

__all__ = ["GradientStack"]


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

    def add(self, numbers: list[int], gradients: Sequence[Mapping[str, Tensor]]) -> None:
        """Add gradients ``[n, *shape]`` of some units, by column and name, of any of the parameters."""
        for stack, found in zip(self.columns, gradients, strict=True):
            for index, name in enumerate(self._names):
                if name in found:
                    self.touched[index] = True
                    stack[index][numbers] += found[name].to(stack[index].device)

    def clear(self) -> None:
        """Back to empty."""
        for stack in self.columns:
            for tensor in stack:
                tensor.zero_()
        self._used.clear()
        self.touched[:] = [False] * len(self.touched)

    def kept(self) -> Mapping[str, Tensor]:
        """See `entropy_fast.resuming.Accumulator`; gradients are of units by themselves (`rows`)."""
        return {"touched": flags_of(self.touched)}

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """See `entropy_fast.resuming.Accumulator`."""
        self.touched[:] = found["touched"].tolist()

    def rows(self, start: int, stop: int) -> Mapping[str, Tensor]:
        """See `entropy_fast.resuming.UnitRows`."""
        return {
            f"{column}/{place}": tensor[start:stop]
            for column, stack in enumerate(self.columns)
            for place, tensor in enumerate(stack)
        }

    def restore_rows(self, start: int, stop: int, found: Mapping[str, Tensor]) -> None:
        """See `entropy_fast.resuming.UnitRows`."""
        own = self.rows(start, stop)
        refuse_other_form(found, own)
        for name, tensor in own.items():
            tensor.copy_(found[name])
        self._used |= set(range(start, stop))
