"""Sums of parameter gradients and their inner products."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["GradientSum", "inner_product", "parameter_products"]


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


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Σ_p ⟨left_p, right_p⟩, products and sums in fp64, computed where the left tensors are."""
    return float(_products(left, right).sum())


def parameter_products(left: GradientSum, right: GradientSum) -> Tensor:
    """[parameters] inner products of two sums parameter by parameter, fp64 on the CPU."""
    return _products(left.tensors, right.tensors)


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    found = [
        torch.dot(a.reshape(-1).double(), b.reshape(-1).to(device=a.device, dtype=torch.float64)).cpu()
        for a, b in zip(left, right, strict=True)
    ]
    return torch.stack(found)
