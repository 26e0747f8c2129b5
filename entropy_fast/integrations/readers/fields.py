"""Fields of a foreign batch, by name, whatever kind of object holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts.validation import as_tensor

__all__ = ["Fields", "as_list", "as_several"]


class Fields:
    """Fields of a mapping (also one that is no `Mapping`, like a TensorDict) or of an object with attributes.

    Args:
        reader: the name of the format, for messages.
        batch: what holds the fields.
    """

    def __init__(self, reader: str, batch: Any) -> None:
        self.reader = reader
        self.batch = batch
        # A batch as a mapping answers for its keys alone: its attributes are methods.
        self.by_key = isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__"))
        if not self.by_key and (batch is None or isinstance(batch, (str, bytes, int, float, list, tuple, Tensor))):
            raise RolloutsError(
                f"{reader}: the batch is a {type(batch).__name__}; expected a mapping or an object with attributes.",
                fix="pass what the trainer holds at a step; docs/readers.md names the fields that are read.",
            )

    def get(self, name: str) -> Any:
        """The field; None where it is missing or None."""
        if not self.by_key:
            return getattr(self.batch, name, None)
        return self.batch[name] if name in set(self.batch.keys()) else None

    def first(self, *names: str) -> tuple[str, Any]:
        """Name and value of the first of these fields that is there; the first name and None where none is."""
        for name in names:
            value = self.get(name)
            if value is not None:
                return name, value
        return names[0], None

    def need(self, name: str) -> Any:
        """The field.

        Raises:
            RolloutsError: it is missing.
        """
        value = self.get(name)
        if value is None:
            known = f"its fields: {', '.join(sorted(map(str, self.batch.keys())))}" if self.by_key else "an object"
            raise RolloutsError(
                f"{self.reader}: the batch has no `{name}` ({known}).",
                fix=f"pass a batch of {self.reader}; docs/readers.md names the fields that are read.",
            )
        return value

    def tensor(self, name: str, value: Any = None) -> Tensor:
        """The field (or ``value``, called by its name) as a dense tensor on the CPU.

        Raises:
            RolloutsError: it is missing, or no tensor.
        """
        given = self.need(name) if value is None else value
        tensor = as_tensor(f"{self.reader}.{name}", given, copy=False).cpu()
        # Python's floats are of 64 bits; torch would make 32 of them.
        exact = isinstance(given, (list, tuple, float)) and tensor.is_floating_point()
        return torch.as_tensor(given, dtype=torch.float64) if exact else tensor

    def matrix(self, name: str, rows: int | None = None, columns: int | None = None, *, value: Any = None) -> Tensor:
        """The field as a matrix of so many rows and columns; None is any number.

        Raises:
            RolloutsError: it is missing, or its shape is another.
        """
        tensor = self.tensor(name, value)
        fits = tensor.dim() == 2 and rows in (None, tensor.shape[0]) and columns in (None, tensor.shape[1])
        if not fits:
            self.misshapen(name, list(tensor.shape), [rows or "N", columns or "T"])
        return tensor

    def optional_matrix(self, name: str, rows: int, columns: int) -> Tensor | None:
        """`matrix`, or None where the field is missing."""
        return None if self.get(name) is None else self.matrix(name, rows, columns)

    def misshapen(self, name: str, found: Sequence[Any], expected: Sequence[Any]) -> None:
        """Raise the error of a field of the wrong shape."""
        shown = ", ".join(map(str, expected))
        raise RolloutsError(
            f"{self.reader}: `{name}` has shape {list(found)}; expected [{shown}].",
            fix="pass the batch as the trainer made it, not sliced, shifted or padded again.",
        )


def as_list(value: Any) -> list[Any]:
    """The elements of a tensor, an array or any iterable."""
    if isinstance(value, Tensor):
        return list(value.detach().cpu().tolist()) if value.dim() else [value.item()]
    if isinstance(value, np.ndarray):
        return list(value.reshape(-1).tolist() if value.ndim == 0 else value.tolist())
    return list(value)


def as_several(batch: Any) -> list[Any]:
    """A step's batches: those of a list, or the one that was passed."""
    several = (
        isinstance(batch, Iterable) and not isinstance(batch, (Mapping, str, bytes)) and not hasattr(batch, "keys")
    )
    return list(batch) if several else [batch]
