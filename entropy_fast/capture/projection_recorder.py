"""Projections of every sequence's gradients on a few directions, without the gradients themselves.

Legend: w_ci the coefficient of sequence i in column c, w_ci ∇S_i its part in the column's gradient, V a direction in the space
of the parameters (one for every unit, or the same for all), x_t and dy_t input of a linear map and gradient of its output at
token t.

The gradient of a map's weight by S_i is Σ_t dy_t x_tᵀ over the tokens of a sequence, so its product with V is Σ_t dy_t · (V
x_t): V is applied to the tokens, and what is left is a number for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from entropy_fast.capture.row_recorder import RowRecorder, Term

__all__ = ["Directions", "ProjectionRecorder"]

Directions = Callable[
    [str, int], Sequence[Tensor]
]  # name and unit to one tensor of the parameter's shape per direction


class ProjectionRecorder(RowRecorder):
    """Every sequence's part in columns' gradients, projected on V and summed over parameters; the recorder of the backwards.

    Products are taken in the direction's dtype (fp32 or fp64) and added up in fp64.

    Args:
        directions: V by parameter name and unit.
        n_sequences: N, of the rollouts.
        columns: K numbers: whose part is projected on each of the K directions.
        device: where ``values`` is kept.
        by_unit: whether directions differ between units.

    Attributes:
        values: [N, K] w_ci ∇S_i · V, fp64; 0 for sequences that have not been gone through.
    """

    whole_sequences = True

    def __init__(
        self,
        directions: Directions,
        n_sequences: int,
        columns: Sequence[int],
        device: torch.device,
        *,
        by_unit: bool,
    ) -> None:
        super().__init__()
        self._directions = directions
        self._columns = list(columns)
        self._by_unit = by_unit
        self._rows = torch.zeros(0, dtype=torch.int64)
        self.values = torch.zeros(n_sequences, len(columns), dtype=torch.float64, device=device)

    def start(self, rows: Tensor) -> None:
        """See `RowRecorder.start`."""
        super().start(rows)
        self._rows = rows.to(self.values.device)

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """See `Recorder.product`."""
        found = self._by_rows(name, left, right)
        if found is None:
            return
        left, right = found
        # V is applied to the wider factor: what comes out of it is as narrow as the other.
        turned = right.shape[-1] < left.shape[-1]
        narrow, wide = (right, left) if turned else (left, right)

        def of_run(directions: list[Tensor], span: slice) -> Tensor:
            matrix = torch.cat([v if turned else v.t() for v in directions], 1)
            dtype = torch.promote_types(matrix.dtype, wide.dtype)
            image = wide[span].to(dtype) @ matrix.to(dtype)
            by_direction = image.view(*image.shape[:-1], len(directions), -1)
            return _inner(by_direction, narrow[span].unsqueeze(-2)).sum(1)

        self._add(name, wide.device, of_run)

    def scatter(self, name: str, index: Tensor, rows: Tensor, *, transposed: bool = False) -> None:
        """See `Recorder.scatter`; the parameter is [b, places] if ``transposed``."""
        found = self._by_rows(name, index.unsqueeze(-1), rows)
        if found is None:
            return
        places, values = found

        def of_run(directions: list[Tensor], span: slice) -> Tensor:
            chosen = places[span].squeeze(-1)
            tables = [v.t() if transposed else v for v in directions]
            return torch.stack([_inner(values[span], table[chosen]).sum(1) for table in tables], 1)

        self._add(name, values.device, of_run)

    def per_position(self, name: str, values: Tensor) -> None:
        """See `Recorder.per_position`."""
        found = self._by_rows(name, values)
        if found is None:
            return
        (by_row,) = found
        self._add(
            name,
            values.device,
            lambda directions, span: torch.stack([_inner(by_row[span], v.reshape(-1)).sum(1) for v in directions], 1),
        )

    def per_row(self, name: str, rows: Tensor) -> None:
        """See `Recorder.per_row`."""
        batch = self._batch
        if batch is None:
            return
        shape = self._directions(name, batch.runs[0][0])[0].shape
        by_row = rows.reshape(-1, shape.numel()) if batch.positions is None else rows.flatten(1)
        if by_row.shape[0] != batch.n_rows:
            self.refused.add(name)
            return
        self._add(
            name,
            rows.device,
            lambda directions, span: torch.stack([_inner(by_row[span], v.reshape(-1)) for v in directions], 1),
        )

    def terms(self, unit: Sequence[int], columns: int) -> Iterator[Term]:
        """See `RowRecorder.terms`: the parts of every sequence, ``which`` its place in the microbatch."""
        for place, number in enumerate(unit):
            members = torch.zeros(len(unit), dtype=torch.float64)
            members[place] = 1.0
            for column in range(columns):
                yield Term(number, place, column, members)

    def put(self, name: str, term: Term, gradient: Tensor) -> None:
        """See `RowRecorder.put`."""
        for place, (column, v) in enumerate(zip(self._columns, self._directions(name, term.unit), strict=True)):
            if column == term.column:
                found = _inner(gradient.flatten(), v.to(gradient.device).flatten())
                self.values[self._rows[term.which], place] += found.to(self.values.device)

    def _add(self, name: str, device: torch.device, of_run: Callable[[list[Tensor], slice], Tensor]) -> None:
        """Add up by sequences what ``of_run`` gives, [rows of the run, K] fp64, for every run of rows with one direction."""
        batch = self._batch
        assert batch is not None and batch.sequence is not None
        places = [place for place, column in enumerate(self._columns) if batch.wanted[column]]
        if not places:
            return
        runs = batch.runs if self._by_unit else [(batch.runs[0][0], 0, batch.n_rows)]
        by_row = torch.cat(
            [
                of_run([self._directions(name, unit)[place].to(device) for place in places], slice(begin, end))
                for unit, begin, end in runs
            ]
        )
        by_row = by_row * batch.weights[[self._columns[place] for place in places]].t().to(device)
        lengths = torch.bincount(batch.sequence, minlength=len(self._rows)).to(device)
        # Not index_add: that one is not deterministic on CUDA.
        sums = torch.segment_reduce(by_row, "sum", lengths=lengths)
        self.values[self._rows[:, None], torch.tensor(places)] += sums.to(self.values.device)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Products along the last dimension, added up in fp64."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return (left.to(dtype) * right.to(dtype)).sum(-1, dtype=torch.float64)
