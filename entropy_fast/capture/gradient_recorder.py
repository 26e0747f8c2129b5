"""Gradients of a few units in every column, put together from the signals of the backwards.

Legend: w_ci the coefficient of sequence i in column c of C, Σ_{i in u} w_ci ∇S_i the gradient of unit u in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.capture.row_recorder import RowRecorder, Term
from entropy_fast.ops import add_unit_products

__all__ = ["GradientRecorder"]


class GradientRecorder(RowRecorder):
    """The gradients of every captured parameter in C columns, for U units; the recorder of their backwards.

    Coefficients are applied in the accumulator (fp32, or fp64 for fp64 parameters) and before any sum over positions. Those
    that differ within a sequence are in the signals already, and what is applied here undoes their scales.

    Args:
        parameters: by name.
        n_units: U.
        n_columns: C.
        storage: by name, zeroed tensors [U, *shape] for every column that gradients are added up in; tensors are made where it
            has none.
        by_need: whether a parameter that signals have come for in some columns is there in these alone.

    Attributes:
        columns: for every column name to gradients ``[U, *shape]``, in fp32 or the parameter's dtype, whichever is wider.
        touched: names that have received a signal.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        n_units: int,
        n_columns: int,
        storage: Mapping[str, Sequence[Tensor]] | None = None,
        *,
        by_need: bool = False,
    ) -> None:
        super().__init__()
        self._given: dict[str, set[int]] = {}  # columns that signals have come for since `take`
        self._parameters = parameters
        self._n_units = n_units
        self._storage = storage or {}
        self._by_need = by_need
        self.columns: tuple[dict[str, Tensor], ...] = tuple({} for _ in range(n_columns))
        self.touched: set[str] = set()

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """See `Recorder.product`."""
        rows = self._by_rows(name, left, right)
        if rows is None or self._batch is None:
            return
        into = self._wanted_sums(name)
        if into:
            left, right = (part.flatten(0, 1) for part in rows)
            add_unit_products(into, left, right, self._scales(name, left.device), self._batch.by_unit)

    def scatter(self, name: str, index: Tensor, rows: Tensor, *, transposed: bool = False) -> None:
        """See `Recorder.scatter`."""
        found = self._by_rows(name, index.unsqueeze(-1), rows)
        if found is None or self._batch is None:
            return
        (places, values), scales = found, self._scales(name, rows.device)
        for total, scale in zip(self._wanted_sums(name), scales, strict=True):
            for unit, begin, end in self._batch.runs:
                scaled = (values[begin:end].to(total.dtype) * scale[begin:end, None, None]).flatten(0, 1)
                chosen = places[begin:end].flatten()
                into = total[unit].t() if transposed else total[unit]
                if total.is_cuda:
                    # index_add is not deterministic there.
                    into += torch.ops.aten.embedding_dense_backward(scaled, chosen, into.shape[0], -1, False)
                else:
                    into.index_add_(0, chosen, scaled)

    def per_position(self, name: str, values: Tensor) -> None:
        """See `Recorder.per_position`."""
        found = self._by_rows(name, values)
        if found is not None:
            # Sums of 16-bit numbers over positions are taken in the accumulator.
            self.per_row(name, found[0].sum(1, dtype=self._dtype(name)))

    def per_row(self, name: str, rows: Tensor) -> None:
        """See `Recorder.per_row`."""
        if self._batch is None:
            return
        if self._batch.positions is None:
            # [1, N, ..., b] with ones elsewhere: a vector for every token.
            rows = rows.reshape(-1, *self._parameters[name].shape)
        if rows.shape[0] != self._batch.n_rows:
            self.refused.add(name)
            return
        for total, scale in zip(self._wanted_sums(name), self._scales(name, rows.device), strict=True):
            for unit, begin, end in self._batch.runs:
                wide = rows[begin:end].to(total.dtype).flatten(1)
                total[unit] += (scale[begin:end] @ wide).view(total.shape[1:])

    def take(self, name: str) -> list[Tensor | None]:
        """By column the gradients of a parameter, which begin anew; None where no signal has come since they did.

        Not with ``storage``.
        """
        given = self._given.pop(name, set())
        found = [store.pop(name, None) for store in self.columns]
        return [own if column in given else None for column, own in enumerate(found)]

    def terms(self, unit: Sequence[int], columns: int) -> Iterator[Term]:
        """See `RowRecorder.terms`: every column of every unit, ``which`` its number."""
        for number in sorted(set(unit)):
            members = (torch.tensor(unit) == number).double()
            for column in range(columns):
                yield Term(number, column, column, members)

    def put(self, name: str, term: Term, gradient: Tensor) -> None:
        """See `RowRecorder.put`."""
        total = self._sums(name, [term.which])[0][term.unit]
        total += gradient.to(total.dtype)

    def _sums(self, name: str, wanted: Sequence[int]) -> list[Tensor]:
        """Of the wanted columns."""
        self.touched.add(name)
        self._given.setdefault(name, set()).update(wanted)
        parameter, kept = self._parameters[name], self._storage.get(name)
        for column, store in enumerate(self.columns):
            if name in store or (self._by_need and column not in wanted):
                continue
            if kept is None:
                shape = (self._n_units, *parameter.shape)
                store[name] = torch.zeros(shape, dtype=self._dtype(name), device=parameter.device)
            else:
                store[name] = kept[column]
        return [self.columns[column][name] for column in wanted]

    def _wanted_sums(self, name: str) -> list[Tensor]:
        assert self._batch is not None
        return self._sums(name, [column for column, own in enumerate(self._batch.wanted) if own])

    def _scales(self, name: str, device: torch.device) -> Tensor:
        batch, dtype = self._batch, self._dtype(name)
        assert batch is not None
        if (device, dtype) not in batch.scales:
            batch.scales[device, dtype] = batch.weights[batch.wanted].to(device=device, dtype=dtype)
        return batch.scales[device, dtype]

    def _dtype(self, name: str) -> torch.dtype:
        return torch.promote_types(self._parameters[name].dtype, torch.float32)
