"""RMS norm and the gate of an MLP, as transformers models compute them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gated_silu", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Weight · x / sqrt(mean(x²) + ε) along the last dimension of ``x`` [..., H], for ``weight`` [H]; 16-bit x in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of two tensors [..., H]."""
    return torch.nn.functional.silu(gate) * up
