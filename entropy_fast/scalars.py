"""What counts as one number, wherever an option or a field takes one."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["as_number"]


def as_number(value: object) -> int | float | None:
    """``value`` as a plain number; None where it is none.

    Numbers are Python's and numpy's integers and floats, and tensors and arrays without dimensions that hold one. Booleans,
    texts, complex numbers and anything with a dimension are not.
    """
    if isinstance(value, Tensor):
        readable = value.ndim == 0 and not value.is_meta
        value = value.item() if readable else None
    elif isinstance(value, (np.generic, np.ndarray)):
        # By kind, not by class: numpy's durations are a subclass of its integers.
        value = value.item() if value.ndim == 0 and value.dtype.kind in "iuf" else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if isinstance(value, float) else int(value)
