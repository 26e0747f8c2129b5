"""Moments that bitsandbytes keeps as codes of 8 bits: what its own optimizer reads them as.

A block of consecutive elements has a scale, the largest magnitude in it, and an element is its code's entry in a table of 256
numbers in [-1, 1] times that. The optimizer computes its next step from these numbers and no others, so the geometry is that
of the optimizer, whatever was lost in rounding to codes. A moment far below its block's largest has code 0, and is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.scalars import shown_keys

__all__ = ["dequantized_entry", "is_quantized"]

CODES = 256
PARTS = ("state", "qmap", "absmax")
BLOCK_SIZES = (256, 2048)  # elements to a scale: today's, and that of earlier releases


def is_quantized(entry: Mapping[str, Any]) -> bool:
    """Whether a parameter's plain entry has moments as codes."""
    return any(isinstance(entry.get(key), Tensor) and entry[key].dtype == torch.uint8 for key in ("state1", "state2"))


def dequantized_entry(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with ``state1`` and ``state2`` in fp32, by bitsandbytes' own function, and without tables and scales.

    Args:
        name: of the parameter, for messages.
        entry: as `is_quantized` knows it.

    Raises:
        OptimizerStateError: tables or scales are missing, of another form or not finite; or bitsandbytes is not installed.
    """
    own = {f"{part}{number}" for part in PARTS for number in (1, 2)}
    kept = {key: value for key, value in entry.items() if key not in own}
    return {**kept, **{f"state{number}": _dequantized(name, entry, number) for number in (1, 2)}}


def _dequantized(name: str, entry: Mapping[str, Any], number: int) -> Tensor:
    codes, table, scales = (
        _of_type(entry.get(f"{key}{number}"), dtype)
        for key, dtype in zip(PARTS, (torch.uint8, torch.float32, torch.float32), strict=True)
    )
    if codes is None or table is None or scales is None:
        raise OptimizerStateError(
            f"optimizer state of {name!r} is 8-bit and has keys {shown_keys(entry)}; expected codes 'state{number}' in uint8, "
            f"and 'qmap{number}' and 'absmax{number}' in float32, which is bitsandbytes' format of two states in blocks.",
            fix="use a file of bitsandbytes' Adam8bit or AdamW8bit; other optimizers of it can be given live, for step='next'.",
        )
    sizes = [size for size in BLOCK_SIZES if scales.numel() == -(-codes.numel() // size)]
    least = -math.inf if number == 1 else 0.0  # second moments are squares
    sound = all(bool((t.isfinite() & (t >= bound)).all()) for t, bound in ((table, least), (scales, 0.0)))
    if table.shape != (CODES,) or scales.dim() != 1 or not sizes or not sound:
        raise OptimizerStateError(
            f"optimizer state of {name!r} is 8-bit, and its table 'qmap{number}' of shape {list(table.shape)} or its scales "
            f"'absmax{number}' of shape {list(scales.shape)} do not fit {codes.numel()} codes, or are no possible numbers.",
            fix="use the state of a healthy checkpoint.",
        )
    try:
        from bitsandbytes.functional import dequantize_blockwise
    except ImportError as error:
        raise OptimizerStateError(
            f"optimizer state of {name!r} is 8-bit, and bitsandbytes, which reads it, cannot be imported: {error}",
            fix="install bitsandbytes.",
        ) from error
    found: Tensor = dequantize_blockwise(codes.contiguous(), absmax=scales, code=table, blocksize=sizes[0])
    return found


def _of_type(found: object, dtype: torch.dtype) -> Tensor | None:
    usable = isinstance(found, Tensor) and found.layout == torch.strided and not found.is_meta and found.dtype == dtype
    return found if usable else None  # type: ignore[return-value]
