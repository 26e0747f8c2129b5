"""Keys and values of prompts, which responses continue from, and what the responses send back.

Legend: K_p and V_p keys and values of a prompt, w_i a column's coefficient of response i, C columns.

Responses add up every one's own ∂S_i/∂K_p and ∂S_i/∂V_p, with every column's w_i, in place of sending their plain sum back:
that would no longer know the responses apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PrefixStates"]


class PrefixStates:
    """K_p and V_p of one layer, and what comes back to them.

    Args:
        key: [1, heads, P, D] packed, with the graph of the prompts' forward where they had one of their own.
        value: likewise.
        wanted: whether anything is to come back; None for whether one of them requires a gradient.

    Attributes:
        key, value, wanted: the same.
        cotangents: Σ w_i ∂S_i/∂K_p of every column, [C, heads, P, D] in fp32 or wider, and likewise of V_p; None before a
            backward.
    """

    def __init__(self, key: Tensor, value: Tensor, wanted: bool | None = None) -> None:
        self.key, self.value = key, value
        self.wanted = key.requires_grad or value.requires_grad if wanted is None else wanted
        self.cotangents: tuple[Tensor, Tensor] | None = None

    @property
    def wide(self) -> torch.dtype:
        """Of the cotangents."""
        return torch.promote_types(self.key.dtype, torch.float32)

    def sums(self, columns: int) -> tuple[Tensor, Tensor]:
        """The cotangents of so many columns, zeros at first."""
        if self.cotangents is None:
            key, value = (t.new_zeros((columns, *t.shape[1:]), dtype=self.wide) for t in (self.key, self.value))
            self.cotangents = key, value
        return self.cotangents

    def take_sums(self) -> tuple[Tensor, Tensor] | None:
        """The cotangents, which the next backward starts anew; None where none has come."""
        found, self.cotangents = self.cotangents, None
        return found
