"""RMS norm and the gate of an MLP, as transformers models compute them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gated_silu", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Weight · x / sqrt(mean(x²) + ε) along the last dimension of ``x`` [..., H], for ``weight`` [H]."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of two tensors [..., H]."""
    return torch.nn.functional.silu(gate) * up
