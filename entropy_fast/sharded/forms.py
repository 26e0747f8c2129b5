"""Who keeps which elements of a trained parameter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.distributed.dealing import deal

__all__ = ["Form", "all_have_some", "dealt_forms"]


@dataclasses.dataclass(frozen=True)
class Form:
    """What gradients of a trained parameter look like, and who keeps which of its elements.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        dtype: that gradients are added up in.
        layer: number of the layer that it is in; that of layers where it is in none.
        rows: of every rank, of the first dimension; all of them or none where `divided` says so.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    layer: int
    rows: tuple[range, ...] = ()

    @property
    def divided(self) -> bool:
        """Whether ranks keep rows of it; a vector is kept whole."""
        return len(self.shape) > 1

    def piece(self, rank: int) -> torch.Size:
        """Shape of what a rank keeps."""
        if self.divided:
            return torch.Size([len(self.rows[rank]), *self.shape[1:]])
        return self.shape if self.rows[rank] else torch.Size([0])

    def elements(self, rank: int) -> int:
        """That a rank keeps."""
        return self.piece(rank).numel()

    def cut(self, tensor: Tensor, rank: int) -> Tensor:
        """What a rank keeps of ``[*shape]``."""
        rows = self.rows[rank]
        if self.divided:
            return tensor[rows.start : rows.stop]
        return tensor if rows else tensor.reshape(-1)[:0]

    def cut_units(self, tensor: Tensor, rank: int) -> Tensor:
        """What a rank keeps of ``[n, *shape]``."""
        rows = self.rows[rank]
        if self.divided:
            return tensor[:, rows.start : rows.stop]
        return tensor if rows else tensor.reshape(len(tensor), -1)[:, :0]


def dealt_forms(forms: Sequence[Form], ranks: int) -> list[Form]:
    """With the rows of every rank: of a matrix as FSDP2 deals them, vectors by their sizes."""
    vectors = [place for place, form in enumerate(forms) if not form.divided]
    owner = {
        vectors[number]: rank
        for rank, numbers in enumerate(deal([max(1, forms[place].shape.numel()) for place in vectors], ranks))
        for number in numbers
    }
    found = []
    for place, form in enumerate(forms):
        if form.divided:
            most = -(-form.shape[0] // ranks)
            bounds = [min(rank * most, form.shape[0]) for rank in range(ranks + 1)]
            rows = tuple(range(start, stop) for start, stop in itertools.pairwise(bounds))
        else:
            rows = tuple(range(int(owner[place] == rank)) for rank in range(ranks))
        found.append(dataclasses.replace(form, rows=rows))
    return found


def all_have_some(forms: Sequence[Form]) -> bool:
    """Whether every rank keeps something."""
    return all(any(form.elements(rank) for form in forms) for rank in range(len(forms[0].rows) if forms else 0))
