"""What `linear_token_logprobs` works on, as every backend of it is given it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LinearInputs"]


class LinearInputs(NamedTuple):
    """Arguments of the op, in the order of its schema; the dispatcher leaves out trailing ones that have their default.

    They mean what `entropy_fast.ops.linear_token_logprobs` says.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    want_entropy: bool = False
    unit_gradients: bool = False
    ignore_index: int = -100
    backend: str = "auto"

    @property
    def n_units(self) -> int:
        """How many unit gradients are wanted."""
        return self.unit_gradients * (1 + self.want_entropy)
