"""Whose signals a backward brings: what every recorder has to know about the rows of a microbatch.

Legend: w_ci the coefficient of sequence i in column c of C, S_i its log-prob, Σ_{i in u} w_ci ∇S_i unit u's gradient in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from entropy_fast.capture.recorder import Recorder
from entropy_fast.ops import UnitRuns

__all__ = ["RowRecorder", "SignalBatch", "Term"]


class Term(NamedTuple):
    """One gradient that a recorder asks for where nothing was captured: that of the losses of some sequences, added up.

    Attributes:
        unit: whose it is.
        which: which of the unit's gradients, in the recorder's own count.
        column: of the losses.
        members: [n] 1 for the microbatch's sequences that count, 0 for the others, fp64.
    """

    unit: int
    which: int
    column: int
    members: Tensor


class RowRecorder(Recorder):
    """A recorder that is told before every backward which rows of the signals belong together.

    Attributes:
        whole_sequences: whether sequences must not share the tokens of their prompt, since what they send back to it is wanted
            apart.
        refused: names whose signal did not come by sequences.
    """

    whole_sequences: ClassVar[bool] = False

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self._batch: SignalBatch | None = None
        self._packed_tokens: int | None = None

    def start(self, rows: Tensor) -> None:
        """Say which sequences the next microbatch has, [n] row indices into the rollouts; pauses."""
        del rows
        self.pause()

    def expect(self, unit: Sequence[int], weights: Tensor, positions: int) -> None:
        """Say whose signals come next: N rows of sequences.

        Args:
            unit: [N] unit of every row, rows of one unit next to one another.
            weights: [C, N] what signals are multiplied by for every column, fp64: coefficients, or what undoes a scale.
            positions: T, in each row.
        """
        self._packed_tokens = None
        own = torch.arange(len(unit), device=weights.device)
        self._batch = SignalBatch(_runs(unit), len(unit), weights, positions, own)

    def expect_packed(
        self, runs: Sequence[tuple[int, int, int]], weights: Tensor, sequence: Tensor | None = None
    ) -> None:
        """Say whose signals come next: one row [1, N, ...] in which the tokens of many sequences stand in a line.

        Args:
            runs: unit, first token and the one after the last, covering all N tokens in order.
            weights: [C, N] what every token's signals are multiplied by for every column, fp64.
            sequence: [N] the microbatch's sequence that every token belongs to, ascending; None where tokens are shared.
        """
        self._packed_tokens = weights.shape[1]
        self._batch = SignalBatch(list(runs), weights.shape[1], weights, None, sequence)

    def pause(self, packed_tokens: int | None = None) -> None:
        """Ignore signals until the next `expect`; says how many tokens the next forward packs into one row, if it does."""
        self._batch = None
        self._packed_tokens = packed_tokens

    def terms(self, unit: Sequence[int], columns: int) -> Iterator[Term]:
        """The gradients that are wanted of a parameter that is not captured.

        Args:
            unit: [n] unit of every sequence of the microbatch.
            columns: how many there are.
        """
        raise NotImplementedError

    def put(self, name: str, term: Term, gradient: Tensor) -> None:
        """Take in what `terms` asked for, found in another way."""
        raise NotImplementedError

    def rows_of(self, x: Tensor) -> tuple[int, ...]:
        """See `Recorder.rows_of`."""
        leading = x.shape[:-1]
        if self._packed_tokens is None:
            return (x.shape[0], *(1,) * (x.dim() - 2))
        matching = [dimension for dimension, size in enumerate(leading) if size == self._packed_tokens]
        # Where it cannot be told along which dimension the tokens go, the signal will be refused.
        along = matching[0] if len(matching) == 1 else None
        return tuple(size if dimension == along else 1 for dimension, size in enumerate(leading))

    def _by_rows(self, name: str, *parts: Tensor) -> list[Tensor] | None:
        """``[N, T, ·]`` views, or None where there is no such shape in them."""
        batch = self._batch
        if batch is None:
            return None
        shaped = []
        for part in parts:
            if batch.positions is None:
                by_token = part if part.dim() == 2 else part.flatten(0, 1) if part.dim() >= 3 else None
                if by_token is None or by_token.shape[0] != batch.n_rows or (part.dim() > 2 and part.shape[0] != 1):
                    self.refused.add(name)
                    return None
                shaped.append(by_token.reshape(batch.n_rows, -1, part.shape[-1]))
            elif part.dim() >= 3 and part.shape[0] == batch.n_rows:
                shaped.append(part.flatten(1, -2))
            elif part.dim() == 2 and part.shape[0] == batch.n_rows * batch.positions:
                shaped.append(part.view(batch.n_rows, batch.positions, -1))
            else:
                self.refused.add(name)
                return None
        return shaped


class SignalBatch:
    """The rows of the backward under way, and the runs of rows that belong to one unit.

    In a packed batch (``positions`` None) every token counts as a row.
    """

    def __init__(
        self,
        runs: list[tuple[int, int, int]],
        n_rows: int,
        weights: Tensor,
        positions: int | None,
        sequence: Tensor | None,
    ) -> None:
        self.runs, self.n_rows, self.weights, self.positions = runs, n_rows, weights, positions
        self.sequence = sequence
        # What is 0 throughout adds nothing, and is not computed.
        self.wanted: list[bool] = (weights != 0).any(1).tolist()
        self.scales: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.by_unit = UnitRuns(runs)


def _runs(unit: Sequence[int]) -> list[tuple[int, int, int]]:
    """Unit, begin and end of every stretch of rows of one unit."""
    runs: list[tuple[int, int, int]] = []
    for row, number in enumerate(unit):
        if runs and runs[-1][0] == number:
            runs[-1] = (number, runs[-1][1], row + 1)
        else:
            runs.append((number, row, row + 1))
    return runs
