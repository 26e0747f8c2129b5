"""The table by which one launch of precondition_accumulate finds all its tensors (csrc/precondition_accumulate.h).

Every kernel reads the same three arrays: ``entries`` [n, 8] int64 with the addresses, size, first chunk and kind of each
tensor, ``factors`` [n, 3] float64 (bias correction, ε, ratio), and ``owners`` [chunks] int32, which tensor each chunk is of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "AccumulationTable", "Kind", "accumulation_table", "kind_of"]

CHUNK = 8192  # elements; kAccumulateChunk in C++


class Kind(NamedTuple):
    """How the tensors of one entry are stored: its number in the table, and the dtypes of v and of the sums."""

    number: int
    moment_dtype: torch.dtype
    sum_dtype: torch.dtype


_KINDS = {
    (torch.float32, torch.float32): Kind(0, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32): Kind(1, torch.float32, torch.float32),
    (torch.float16, torch.float32): Kind(2, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16): Kind(3, torch.bfloat16, torch.float32),
    (torch.float64, torch.float64): Kind(4, torch.float64, torch.float64),
}


def kind_of(gradient: torch.dtype, moment: torch.dtype) -> Kind:
    """The kind for gradients and second moments of these dtypes; its ``moment_dtype`` is what v has to be converted to."""
    return _KINDS.get((gradient, moment)) or _KINDS[gradient, torch.promote_types(gradient, torch.float32)]


@dataclasses.dataclass(frozen=True)
class AccumulationTable:
    """The table on the device of its tensors.

    Attributes:
        entries: ``[n, 8]`` int64.
        factors: ``[n, 3]`` float64.
        owners: ``[chunks]`` int32.
        kinds: the kinds that occur, ascending.
        keep_alive: what the addresses point to, and the pinned memory the table was copied from.
    """

    entries: Tensor
    factors: Tensor
    owners: Tensor
    kinds: tuple[int, ...]
    keep_alive: tuple[object, ...]

    @property
    def n_tensors(self) -> int:
        """Number of tensors in the table."""
        return self.entries.shape[0]

    @property
    def n_chunks(self) -> int:
        """Number of chunks in all."""
        return self.owners.shape[0]


# A few kilobytes each; nothing tells when a graph is gone.
_captured: list[AccumulationTable] = []


def accumulation_table(
    x: Sequence[Tensor],
    g: Sequence[Tensor],
    v: Sequence[Tensor | None],
    X_sum: Sequence[Tensor],
    Y_sum: Sequence[Tensor],
    factors: Sequence[tuple[float, float, float]],
) -> AccumulationTable:
    """The table of these tensors, which must be contiguous, on one device and of a kind that is known.

    On a GPU it is copied from pinned memory without waiting. Where that copy is captured into a CUDA graph, every replay
    copies again from the same memory: such tables are kept as long as the process lives.
    """
    rows, chunks = [], 0
    for entropy, update, moment, x_sum, y_sum in zip(x, g, v, X_sum, Y_sum, strict=True):
        kind = kind_of(entropy.dtype, torch.float32 if moment is None else moment.dtype)
        address = 0 if moment is None else moment.data_ptr()
        pointers = (entropy.data_ptr(), update.data_ptr(), address, x_sum.data_ptr(), y_sum.data_ptr())
        rows.append((*pointers, entropy.numel(), chunks, kind.number))
        chunks += -(-entropy.numel() // CHUNK)
    entries = np.array(rows, dtype=np.int64).reshape(-1, 8)
    counts = -(-entries[:, 5] // CHUNK)
    host = (
        torch.from_numpy(entries),
        torch.tensor(list(factors), dtype=torch.float64).reshape(-1, 3),
        torch.from_numpy(np.repeat(np.arange(len(entries), dtype=np.int32), counts)),
    )
    kinds = tuple(sorted(set(entries[:, 7].tolist())))
    device = x[0].device if x else torch.device("cpu")
    tensors = (tuple(x), tuple(g), tuple(v), tuple(X_sum), tuple(Y_sum))
    if device.type == "cpu":
        return AccumulationTable(*host, kinds, tensors)
    pinned = tuple(part.pin_memory() for part in host)
    entries_there, factors_there, owners_there = (part.to(device, non_blocking=True) for part in pinned)
    table = AccumulationTable(entries_there, factors_there, owners_there, kinds, (*tensors, pinned))
    if torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table
