"""Sequences packed end to end: no token of padding is computed, and a prompt's tokens are computed once."""

from entropy_fast.ways.packed.way import PackedWay

__all__ = ["PackedWay"]
