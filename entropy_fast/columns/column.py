"""Columns: what a probe weighs sequences and tokens by, on the functional side and on the update side.

Legend: S_i log-prob of sequence i, s_t log-prob and H_t entropy of response token t; c_i, or c_t and e_t, a column's
coefficients. The gradient that belongs to a column is

    Σ_i c_i ∇S_i        where the tokens of a sequence share one coefficient, and else
    Σ_t (c_t ∇s_t + e_t ∇H_t)

Everything a backward can weigh is such a column: an entropy, the advantages, and any number per sequence or token.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import Coefficients, ColumnWeights, RatioTable
from entropy_fast.columns.tokens import TokenPlaces
from entropy_fast.errors import GraphDetachedError, RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["Column", "ColumnDefaults", "Columns", "ScoredTokens", "Side"]


class Side(enum.Enum):
    """What a column's gradient is of: something whose change is forecast, or the update that changes it."""

    FUNCTIONAL = "entropy"
    UPDATE = "update"


@dataclasses.dataclass(frozen=True)
class ScoredTokens:
    """What a forward said about n sequences with M response tokens in all, sequence by sequence; detached.

    Attributes:
        rollouts: the batch.
        rows: [n] row indices into it: all the rows of some prompts.
        sequence_logprobs: [n] S_i, nats.
        logprobs: [M] s_t, nats.
        entropies: [M] H_t, nats; None where they were not asked for.

    Raises:
        GraphDetachedError: a log-prob is NaN, so no gradient means anything.
        RolloutsError: the model gives a response token probability 0.
    """

    rollouts: Rollouts
    rows: Tensor
    sequence_logprobs: Tensor
    logprobs: Tensor
    entropies: Tensor | None

    def __post_init__(self) -> None:
        refuse_not_finite(self)

    @cached_property
    def places(self) -> TokenPlaces:
        """Where the tokens stand in a table of sequences."""
        return TokenPlaces.of(self.rollouts, self.rows)


class Column(Protocol):
    """One column. A new one is a class with these, made where `entropy_fast.columns.columns_of` makes the others."""

    @property
    def name(self) -> str:
        """What results call it."""

    @property
    def side(self) -> Side:
        """Functional or update."""

    @property
    def by_token(self) -> bool:
        """Whether coefficients differ within a sequence; then the column takes a backward of its own."""

    @property
    def needs_entropies(self) -> bool:
        """Whether it asks for H_t."""

    def check(self, rollouts: Rollouts) -> None:
        """Raise unless the column can be formed for a batch (without empty responses).

        Raises:
            RolloutsError: it cannot.
        """

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """Its coefficients for some prompts."""

    def counted(self, scored: ScoredTokens) -> Tensor | None:
        """[M] 1 at tokens whose entropy counts and 0 at others (CPU); None for a column of which all count, or none does."""

    def clipped(self, scored: ScoredTokens, log_ratios: Tensor) -> Tensor | None:
        """[M] bool (CPU): tokens that a clip range leaves out, from log r_t [M]; None for a column that clips nothing."""


class ColumnDefaults:
    """What most columns have to say of tokens: nothing. A base for them."""

    def counted(self, scored: ScoredTokens) -> Tensor | None:
        """See `Column.counted`: nothing."""
        return None

    def clipped(self, scored: ScoredTokens, log_ratios: Tensor) -> Tensor | None:
        """See `Column.clipped`: nothing."""
        return None


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of one pass over a batch, in order.

    Args:
        members: the columns.
    """

    members: tuple[Column, ...]

    def __iter__(self) -> Iterator[Column]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def of_side(self, side: Side) -> Columns:
        """Those of one side."""
        return Columns(tuple(column for column in self.members if column.side is side))

    def places_of(self, side: Side) -> list[int]:
        """Indices of those of one side."""
        return [place for place, column in enumerate(self.members) if column.side is side]

    @property
    def needs_entropies(self) -> bool:
        """Whether any of them asks for H_t."""
        return any(column.needs_entropies for column in self.members)

    @property
    def backwards(self) -> int:
        """How many backwards bring them all: one for those by sequence together, one for each by token."""
        by_token = sum(column.by_token for column in self.members)
        return by_token + (by_token < len(self.members))

    @property
    def most_at_once(self) -> int:
        """The most columns that one backward serves."""
        # One that waits for scores may turn out to be by sequence.
        return max(1, sum(not column.by_token or hasattr(column, "resolved") for column in self.members))

    def check(self, rollouts: Rollouts) -> None:
        """Raise unless all of them can be formed for a batch.

        Raises:
            RolloutsError: one cannot.
        """
        for column in self.members:
            column.check(rollouts)

    def weigh(self, scored: ScoredTokens) -> Coefficients:
        """Their coefficients for some prompts."""
        weights = [column.weigh(scored) for column in self.members]
        by_token = any(own.of_logprob is not None or own.of_entropy is not None for own in weights)
        return Coefficients(
            torch.stack([own.by_sequence for own in weights]),
            tuple(weights),
            scored.places.sequence.to(scored.logprobs.device) if by_token else None,
            self._ratios(scored),
            self._entropy_sums(scored),
        )

    def _entropy_sums(self, scored: ScoredTokens) -> Tensor | None:
        if scored.entropies is None:
            return None
        values = scored.entropies.detach().to(device="cpu", dtype=torch.float64)
        for column in self.members:
            counted = column.counted(scored)
            if counted is not None:
                return scored.places.table(values * counted).sum(1)
        return scored.places.table(values).sum(1)

    def _ratios(self, scored: ScoredTokens) -> RatioTable | None:
        log_ratios = log_ratios_of(scored)
        if log_ratios is None:
            return None
        places = scored.places
        found = [own for column in self.members if (own := column.clipped(scored, log_ratios)) is not None]
        clipped = places.means(found[0].double()) if found else torch.full((len(scored.rows),), torch.nan).double()
        return RatioTable(places.means(log_ratios.abs()), places.table(log_ratios.abs()).amax(1), clipped)


def refuse_not_finite(scored: ScoredTokens) -> None:
    """Raise when a log-prob is NaN or -inf.

    Raises:
        GraphDetachedError: one is NaN, so no gradient means anything.
        RolloutsError: one is -inf: the model gives that token probability 0; the message names row and token.
    """
    values = scored.logprobs.detach()
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    if bool(torch.isnan(values).any()):
        raise GraphDetachedError(
            f"{int(torch.isnan(values).sum())} of {values.numel()} response-token log-probs are NaN.",
            fix="look for NaN in the weights or adapter, or fp16 overflow (use bfloat16 autocast); in float64, eager attention "
            "gives NaN where padded queries see no key (a sliding window, rows of unequal length): load with "
            "attn_implementation='sdpa'.",
        )
    first = int((~finite).nonzero()[0])
    row, place = int(scored.rows[scored.places.sequence[first]]), int(scored.places.column[first])
    rollouts = scored.rollouts
    kept = (rollouts.loss_mask[row] == 1) & (rollouts.attention_mask[row] == 1)
    raise RolloutsError(
        f"Rollouts: response token {place} of row {row} (empty responses not counted), id "
        f"{int(rollouts.input_ids[row][kept][place])}, "
        f"has log-prob {float(values[first])}: the model gives it probability 0, so it cannot have been sampled from it.",
        fix="score responses with the model (and tokenizer) that sampled them; mask tokens that were forced on it.",
    )


def log_ratios_of(scored: ScoredTokens) -> Tensor | None:
    """[M] log r_t = s_t - s_t^old, fp64 on the CPU; None where the rollouts have no ``old_logprobs``."""
    old = scored.rollouts.of_response_tokens("old_logprobs", scored.rows)
    return None if old is None else scored.logprobs.detach().to(device="cpu", dtype=torch.float64) - old
