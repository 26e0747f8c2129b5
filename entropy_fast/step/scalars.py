"""Numbers in whatever form a caller or a file has them, and how to name in a message what is none."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["real_number", "shown", "shown_keys"]

LONGEST_TEXT = 80


def real_number(value: object) -> float | None:
    """The float of a Python or numpy number, or of a tensor with one element.

    Args:
        value: anything, also from a file that is not trusted.

    Returns:
        The number (possibly NaN or infinite); None for truth values, texts, containers, tensors without a readable real
        value, and integers too large for a float.
    """
    if isinstance(value, Tensor):
        readable = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        if not readable or value.numel() != 1 or value.is_complex():
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def shown(value: object) -> str:
    """What a value is, in a few words that are safe to print: no control characters, no endless texts or containers."""
    if isinstance(value, Tensor):
        number = real_number(value)
        return f"a tensor of shape {list(value.shape)}" if number is None else f"a tensor of {number}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (int, float, complex)):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + "...")
    if isinstance(value, (tuple, list)):
        inside = ", ".join("..." if isinstance(item, (tuple, list)) else shown(item) for item in value[:4])
        return f"[{inside}{', ...' if len(value) > 4 else ''}]"
    return f"a {type(value).__name__}"


def shown_keys(table: Mapping[Any, object], most: int = 8) -> str:
    """The first keys of a table in order, safe to print."""
    keys = sorted(map(shown, table))
    return f"[{', '.join(keys[:most])}{', ...' if len(keys) > most else ''}]"
