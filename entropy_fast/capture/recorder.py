"""What a captured module hands its parameter's signal to."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Recorder"]


class Recorder(Protocol):
    """Receives signals during a backward; N rows of sequences, T positions."""

    def rows_of(self, x: Tensor) -> tuple[int, ...]:
        """The shape of ``x`` [..., H] without its last dimension, and 1 in every dimension that rows do not go along."""

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """The gradient [a, b] is Σ over positions of the outer products of ``left`` [N, T, a] and ``right`` [N, T, b]."""

    def scatter(self, name: str, index: Tensor, rows: Tensor, *, transposed: bool = False) -> None:
        """The gradient is the sum of ``rows`` [N, T, b] into the places ``index`` [N, T] of a [places, b] parameter.

        The parameter is [b, places] if ``transposed``.
        """

    def per_position(self, name: str, values: Tensor) -> None:
        """The gradient [b] is the sum of ``values`` [N, T, b] over rows and positions."""

    def per_row(self, name: str, rows: Tensor) -> None:
        """The gradient is the sum of ``rows`` [N, *parameter shape], of any shape, over the first dimension."""
