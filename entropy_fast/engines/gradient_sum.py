"""Sums of parameter gradients and their inner products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.resuming.held import flags_of

__all__ = ["GradientSum", "inner_product", "parameter_products", "row_products"]

# Elements whose products are added up in the tensors' dtype; beyond that in fp64.
_COLUMNS = 4096


@dataclasses.dataclass
class GradientSum:
    """One accumulator per registered parameter, in fp32 or the parameter's dtype, whichever is wider.

    Attributes:
        tensors: the sums, in registry order, each in its parameter's shape.
        touched: whether a gradient ever arrived, per parameter.
    """

    tensors: list[Tensor]
    touched: list[bool]

    @classmethod
    def zeros(cls, parameters: Sequence[Tensor], device: torch.device | None) -> GradientSum:
        """Empty sums on ``device``, or on each parameter's own when it is None."""
        tensors = [
            torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=device or p.device)
            for p in parameters
        ]
        return cls(tensors, [False] * len(tensors))

    def add(self, gradients: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Add one gradient per parameter, divided by ``scale`` (a power of two); None means that none arrived."""
        for index, (total, gradient) in enumerate(zip(self.tensors, gradients, strict=True)):
            if gradient is not None:
                total.add_(gradient.to(device=total.device, dtype=total.dtype), alpha=1.0 / scale)
                self.touched[index] = True

    def clear(self) -> None:
        """Back to empty."""
        for tensor in self.tensors:
            tensor.zero_()
        self.touched[:] = [False] * len(self.touched)

    def kept(self) -> Mapping[str, Tensor]:
        """See `entropy_fast.resuming.Accumulator`."""
        return {str(place): tensor for place, tensor in enumerate(self.tensors)} | {"touched": flags_of(self.touched)}

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """See `entropy_fast.resuming.Accumulator`."""
        for place, tensor in enumerate(self.tensors):
            tensor.copy_(found[str(place)])
        self.touched[:] = found["touched"].tolist()


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Σ_p ⟨left_p, right_p⟩, products and sums in fp64, computed where the left tensors are."""
    return float(_products(left, right).sum())


def parameter_products(left: GradientSum, right: GradientSum) -> Tensor:
    """[parameters] inner products of two sums parameter by parameter, fp64 on the CPU."""
    return _products(left.tensors, right.tensors)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """[n] inner products of rows ``[n, d]`` with one vector ``[d]``, or with rows ``[n, d]`` of their own; fp64 on the CPU."""
    right = right.to(left.device)
    if right.dim() == 2:
        return (left * right).sum(1, dtype=torch.float64).cpu()
    whole = len(right) // _COLUMNS * _COLUMNS
    found = left[:, whole:].double() @ right[whole:].double()
    if whole:
        blocks = left[:, :whole].view(len(left), -1, _COLUMNS).transpose(0, 1) @ right[:whole].view(-1, _COLUMNS, 1)
        found = found + blocks.double().sum(0)[:, 0]
    return found.cpu()


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    found = [
        torch.dot(a.reshape(-1).double(), b.reshape(-1).to(device=a.device, dtype=torch.float64)).cpu()
        for a, b in zip(left, right, strict=True)
    ]
    return torch.stack(found)
