"""What a pass over a batch knows about every sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import Coefficients, RatioTable
from entropy_fast.columns.column import Columns

__all__ = ["SequenceTable"]


@dataclasses.dataclass(frozen=True)
class SequenceTable:
    """Of N sequences; NaN where nothing is known (yet). All [N], fp64, CPU.

    Attributes:
        sequence_logprobs: S_i, nats.
        entropy_sums: Σ_t H_t over the response's tokens whose entropy counts, nats; NaN where entropies were not computed.
        coefficients: by name of a column: c_i or a_i; where coefficients differ from token to token, their mean (of those of
            ∇s_t alone).
        ratios: None where the rollouts have no ``old_logprobs``.
    """

    sequence_logprobs: Tensor
    entropy_sums: Tensor
    coefficients: Mapping[str, Tensor]
    ratios: RatioTable | None = None

    @classmethod
    def of(cls, n_sequences: int, columns: Columns, *, ratios: bool) -> SequenceTable:
        """A table in which nothing is known."""

        def unknown() -> Tensor:
            return torch.full((n_sequences,), torch.nan, dtype=torch.float64)

        coefficients = {column.name: unknown() for column in columns}
        return cls(unknown(), unknown(), coefficients, RatioTable.empty(n_sequences) if ratios else None)

    @property
    def known(self) -> list[Tensor]:
        """All of its tensors, each [N]."""
        ratios = [] if self.ratios is None else list(vars(self.ratios).values())
        return [self.sequence_logprobs, self.entropy_sums, *self.coefficients.values(), *ratios]

    def put(self, rows: Tensor, sequence_logprobs: Tensor, coefficients: Coefficients) -> None:
        """Write the values of some rows."""
        self.sequence_logprobs[rows] = sequence_logprobs.detach().to(device="cpu", dtype=torch.float64)
        if coefficients.entropy_sums is not None:
            self.entropy_sums[rows] = coefficients.entropy_sums
        for kept, found in zip(self.coefficients.values(), coefficients.by_sequence, strict=True):
            kept[rows] = found.cpu()
        if self.ratios is not None and coefficients.ratios is not None:
            for kept, found in zip(vars(self.ratios).values(), vars(coefficients.ratios).values(), strict=True):
                kept[rows] = found
