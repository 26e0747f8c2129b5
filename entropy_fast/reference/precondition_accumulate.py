"""Precondition one gradient, add it and another to their sums, and take their inner products, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["precondition_accumulate"]


def precondition_accumulate(
    x: Sequence[Tensor],
    g: Sequence[Tensor],
    v: Sequence[Tensor | None],
    X_sum: Sequence[Tensor],
    Y_sum: Sequence[Tensor],
    *,
    bias_correction: Sequence[float],
    eps: Sequence[float],
    ratio: Sequence[float],
    x_scale: float = 1.0,
    g_scale: float = 1.0,
    update: bool = True,
) -> Tensor:
    """For every tensor of the lists: y = g · g_scale · ratio / (√(v · bias_correction) + eps), then X_sum += x, Y_sum += y.

    Args:
        x: entropy gradients; multiplied by ``x_scale`` first.
        g: update gradients, shaped like ``x``.
        v: second moments; None for a tensor without any. Where v is 0 or None, y is 0.
        X_sum: sums of x, changed in place.
        Y_sum: sums of y, changed in place.
        bias_correction: 1 / (1 - β2^step) of each tensor.
        eps: ε of each tensor.
        ratio: learning rate of each tensor's group, relative to the first group's.
        x_scale: factor of every x.
        g_scale: factor of every g.
        update: False to leave the sums as they are.

    Returns:
        ``[len(x), 3]`` float64: ⟨x, y⟩, ⟨x, Y_sum⟩ and ⟨y, X_sum⟩ of each tensor, with the sums as they were *before* this
        call. Over successive calls ⟨ΣX, ΣY⟩ - Σ⟨x_i, y_i⟩ = Σ_j (⟨x_j, Y_sum⟩ + ⟨y_j, X_sum⟩).
    """
    dots = []
    for index, (x_raw, gradient, moment, sum_x, sum_y) in enumerate(zip(x, g, v, X_sum, Y_sum, strict=True)):
        entropy = x_raw.to(sum_x.dtype) * x_scale
        if moment is None:
            y = torch.zeros_like(sum_y)
        else:
            root = (moment.to(sum_y.dtype) * bias_correction[index]).sqrt()
            # Not `root > 0`: a NaN second moment has to stay visible.
            scale = torch.where(root == 0, 0.0, g_scale * ratio[index] / (root + eps[index]))
            y = gradient.to(sum_y.dtype) * scale
        pairs = ((entropy, y), (entropy, sum_y), (y, sum_x))
        dots.append(torch.stack([torch.dot(a.double().flatten(), b.double().flatten()) for a, b in pairs]))
        if update:
            sum_x += entropy
            sum_y += y
    return torch.stack(dots) if dots else torch.zeros(0, 3, dtype=torch.float64)
