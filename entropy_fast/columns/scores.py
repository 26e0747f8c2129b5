"""What the policy says of every response token of a batch, before any gradient is taken.

Legend: s_t log-prob and H_t entropy of response token t.

Some columns are known only when the whole batch is: those of a loss that couples rows, and of a mean over all tokens. They are
resolved from such scores into columns that any microbatch can be weighed by.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import Column, ScoredTokens
from entropy_fast.errors import ConfigError
from entropy_fast.rollouts import Rollouts

__all__ = ["ResolvedColumn", "ScoresNeededError", "TokenScores", "weigh_whole"]


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Of N sequences in the rollouts' own columns, detached; 0 where no response token stands.

    Attributes:
        logprobs: [N, T] s_t, nats, in the dtype and on the device in which the model gave them.
        entropies: [N, T] H_t, nats, likewise.
    """

    logprobs: Tensor
    entropies: Tensor

    @classmethod
    def empty(cls, rollouts: Rollouts) -> TokenScores:
        """To be filled by `put`."""
        return cls(*(torch.zeros(rollouts.loss_mask.shape, dtype=torch.float64) for _ in range(2)))

    def put(self, scored: ScoredTokens) -> None:
        """Write what a forward said about some sequences."""
        assert scored.entropies is not None
        rows = scored.rows.cpu()
        places = scored.rollouts.loss_mask.cpu()[rows] == 1
        for table, values in ((self.logprobs, scored.logprobs), (self.entropies, scored.entropies)):
            table[rows] = table[rows].masked_scatter(places, values.detach().to(device="cpu", dtype=torch.float64))

    def to(self, *, device: torch.device, dtype: torch.dtype) -> TokenScores:
        """The same elsewhere."""
        return TokenScores(self.logprobs.to(device, dtype), self.entropies.to(device, dtype))

    @classmethod
    def of_whole(cls, scored: ScoredTokens) -> TokenScores | None:
        """From a forward of a whole batch; None where it was of some prompts alone, or without entropies."""
        if len(scored.rows) != scored.rollouts.n_sequences or scored.entropies is None:
            return None
        scores = cls.empty(scored.rollouts)
        scores.put(scored)
        wide = torch.promote_types(scored.logprobs.dtype, torch.float32)
        return scores.to(device=scored.logprobs.device, dtype=wide)

    def of_rows(self, rollouts: Rollouts) -> TokenScores:
        """Those of rows that have response tokens, from scores of all rows of a batch; 0 where no response token stands.

        Raises:
            ConfigError: they are not of the batch, or not finite.
        """
        kept, mask = rollouts.response_lengths > 0, rollouts.loss_mask.cpu() == 1
        tables = []
        for name, given in (("logprobs", self.logprobs), ("entropies", self.entropies)):
            table = torch.as_tensor(given).detach().cpu()
            if table.shape != mask.shape or not bool(torch.isfinite(table[mask]).all()):
                raise ConfigError(
                    f"scores: `{name}` has shape {list(table.shape)}; expected {list(mask.shape)}, finite at response tokens.",
                    fix="pass one number per token, in the token's own column.",
                )
            tables.append(torch.where(mask, table.to(torch.float64), 0.0)[kept])
        return TokenScores(tables[0], tables[1])

    def spread(self, rollouts: Rollouts) -> TokenScores:
        """Of all rows of a batch, from those of its rows that have response tokens; 0 in the others."""
        kept = rollouts.response_lengths > 0
        tables = []
        for own in (self.logprobs, self.entropies):
            table = torch.zeros(rollouts.loss_mask.shape, dtype=own.dtype)
            table[kept] = own.cpu()
            tables.append(table)
        return TokenScores(tables[0], tables[1])

    def of_all(self, rollouts: Rollouts) -> ScoredTokens:
        """As a single forward of the whole batch would say it."""
        mask = rollouts.loss_mask.cpu() == 1
        sums = self.logprobs.double().cpu().sum(-1)
        rows = torch.arange(rollouts.n_sequences)
        return ScoredTokens(rollouts, rows, sums, self.logprobs.cpu()[mask], self.entropies.cpu()[mask])


@runtime_checkable
class ResolvedColumn(Column, Protocol):
    """A column that stands for another one until scores of the whole batch are known.

    Where a forward is of the whole batch it weighs as the one that it stands for; elsewhere it raises `ScoresNeededError`.
    """

    def resolved(self, scores: TokenScores, rollouts: Rollouts) -> Column:
        """The column that it stands for.

        Args:
            scores: of the batch.
            rollouts: the batch, without empty responses.
        """


class ScoresNeededError(Exception):
    """A column that waits for scores of a batch was asked about a part of it; never leaves an engine."""


def weigh_whole(column: ResolvedColumn, scored: ScoredTokens) -> ColumnWeights:
    """What the column that this one stands for says of a whole batch.

    Raises:
        ScoresNeededError: the forward was of a part of it.
    """
    scores = TokenScores.of_whole(scored)
    if scores is None:
        raise ScoresNeededError(column.name)
    return column.resolved(scores, scored.rollouts).weigh(scored)
