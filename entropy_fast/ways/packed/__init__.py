"""Forwards and backwards over packed sequences: no token of padding is computed, and a prompt's tokens are computed once."""

from entropy_fast.ways.packed.passes import PackedPass

__all__ = ["PackedPass"]
