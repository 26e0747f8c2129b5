"""Coefficients of some sequences in every column, and the backwards that they ask of a model.

Legend: S_i log-prob of sequence i, s_t log-prob and H_t entropy of response token t; c_i, or c_t and e_t, coefficients
(`entropy_fast.columns.column`).

Columns whose coefficients do not differ within a sequence share one backward, of Σ_i S_i: what a sequence sends back is
multiplied by its coefficient in each of them where it arrives. Every other column takes a backward of its own, of
Σ_t (c_t s_t + e_t H_t). Its coefficients are scaled by a power of two for each sequence, which is taken out where the signal
arrives, so that what goes back is of ordinary size in every dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Backward",
    "Coefficients",
    "ColumnWeights",
    "RatioTable",
    "ScoredForward",
    "power_of_two_scale",
    "power_of_two_scales",
]


@dataclasses.dataclass(frozen=True)
class ColumnWeights:
    """Coefficients of n sequences with M response tokens in one column; detached, fp64, on the device of the log-probs.

    Attributes:
        by_sequence: [n] c_i; where coefficients differ within a sequence, the mean of c_t over it.
        of_logprob: [M] c_t; None where all tokens of a sequence have c_i.
        of_entropy: [M] e_t; None where the column has no such part.
    """

    by_sequence: Tensor
    of_logprob: Tensor | None = None
    of_entropy: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class RatioTable:
    """How far πθ has moved from ``old_logprobs``, by sequence; log r_t = s_t - s_t^old. All [N], fp64, CPU; NaN if unknown.

    Attributes:
        mean_log_ratio: mean |log r_t| over the response, nats per token.
        largest_log_ratio: the largest, nats.
        clipped: share of the response's tokens that a clip range leaves out of the update.
    """

    mean_log_ratio: Tensor
    largest_log_ratio: Tensor
    clipped: Tensor

    @classmethod
    def empty(cls, n: int) -> RatioTable:
        """A table of n sequences, all unknown."""
        return cls(*(torch.full((n,), torch.nan, dtype=torch.float64) for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class Backward:
    """One backward through n sequences with M response tokens.

    Attributes:
        columns: indices of the columns it serves.
        weights: [C, n] what the signals of every sequence are multiplied by for each of all C columns, fp64; 0 for columns that
            it does not serve.
        of_logprob: [M] what s_t is multiplied by in the loss; None for 1.
        of_entropy: [M] likewise H_t; None for 0.
    """

    columns: tuple[int, ...]
    weights: Tensor
    of_logprob: Tensor | None
    of_entropy: Tensor | None

    def loss(self, logprobs: Tensor, entropies: Tensor | None) -> Tensor:
        """The scalar to differentiate, from s_t and H_t [M] with their graph."""
        if self.of_logprob is None and self.of_entropy is None:
            return logprobs.sum()
        terms = [
            (weights.to(values.dtype) * values).sum()
            for weights, values in ((self.of_logprob, logprobs), (self.of_entropy, entropies))
            if weights is not None and values is not None
        ]
        return sum(terms[1:], terms[0])

    def signal(self, unit_logprob: Tensor, unit_entropy: Tensor | None) -> Tensor:
        """[M, H] the gradient of that scalar by hidden states, from ∂s_t/∂h_t and ∂H_t/∂h_t [M, H]."""
        if self.of_logprob is None and self.of_entropy is None:
            return unit_logprob
        if self.of_logprob is None:
            signal = torch.zeros_like(unit_logprob)
        else:
            signal = unit_logprob * self.of_logprob.to(unit_logprob.dtype).unsqueeze(1)
        if self.of_entropy is not None:
            assert unit_entropy is not None
            signal.addcmul_(unit_entropy, self.of_entropy.to(unit_entropy.dtype).unsqueeze(1))
        return signal


class ScoredForward(Protocol):
    """A forward of n padded sequences with its graph, as `entropy_fast.ways.teacher_forcing.ForwardResult` has it."""

    @property
    def sequence_logprobs(self) -> Tensor:
        """[n] S_i."""

    @property
    def token_logprobs(self) -> Tensor:
        """[n, T] s_t, 0 where nothing is scored."""

    @property
    def scored(self) -> Tensor:
        """[n, T] bool."""

    @property
    def token_entropies(self) -> Tensor | None:
        """[n, T] H_t."""


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Coefficients of n sequences (whole prompts) in C columns.

    Attributes:
        by_sequence: [C, n] c_i, or the mean of c_t over the sequence.
        columns: those of every column.
        sequence: [M] place of every response token's sequence, ascending; None where no column differs within a sequence.
        ratios: how far the policy has moved since it sampled, [n]; None where the rollouts do not say.
        entropy_sums: [n] Σ_t H_t over the tokens whose entropy counts, nats, fp64 on the CPU; None without entropies.
    """

    by_sequence: Tensor
    columns: tuple[ColumnWeights, ...]
    sequence: Tensor | None = None
    ratios: RatioTable | None = None
    entropy_sums: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Coefficients]) -> Coefficients:
        """Of successive sequences, by sequence alone: without those of tokens."""
        ratios = [vars(part.ratios).values() for part in parts if part.ratios is not None]
        sums = [part.entropy_sums for part in parts if part.entropy_sums is not None]
        by_sequence = torch.cat([part.by_sequence for part in parts], 1)
        return cls(
            by_sequence,
            tuple(ColumnWeights(own) for own in by_sequence),
            ratios=RatioTable(*map(torch.cat, zip(*ratios, strict=True))) if ratios else None,
            entropy_sums=torch.cat(sums) if sums else None,
        )

    def by_token(self, column: int) -> bool:
        """Whether coefficients differ within a sequence."""
        return self.columns[column].of_logprob is not None or self.columns[column].of_entropy is not None

    def largest(self, column: int) -> Tensor:
        """[n] the largest |coefficient| of every sequence in a column."""
        if not self.by_token(column):
            return self.by_sequence[column].abs()
        assert self.sequence is not None
        largest = torch.zeros_like(self.by_sequence[column])
        for values in (self.columns[column].of_logprob, self.columns[column].of_entropy):
            if values is not None:
                largest = largest.scatter_reduce(0, self.sequence, values.abs(), "amax")
        return largest

    def backwards(self) -> list[Backward]:
        """The backwards that bring every column's gradient."""
        shared = [column for column in range(len(self.columns)) if not self.by_token(column)]
        found = []
        if shared:
            weights = torch.zeros_like(self.by_sequence)
            weights[shared] = self.by_sequence[shared]
            found.append(Backward(tuple(shared), weights, None, None))
        return found + [self._alone(column) for column in range(len(self.columns)) if column not in shared]

    def _alone(self, column: int) -> Backward:
        """One column by token, scaled sequence by sequence.

        The weight is 0 where a sequence sends nothing back: a 1 there would be the largest by far, and what a prompt's
        responses send back to it is scaled by the largest.
        """
        assert self.sequence is not None
        largest = self.largest(column)
        scales = power_of_two_scales(largest)
        weights = torch.zeros_like(self.by_sequence)
        weights[column] = torch.where(largest > 0, 1.0 / scales, 0.0)
        own, by_token = self.columns[column], scales[self.sequence]
        return Backward(
            (column,),
            weights,
            torch.zeros_like(by_token) if own.of_logprob is None else own.of_logprob * by_token,
            None if own.of_entropy is None else own.of_entropy * by_token,
        )

    def losses(self, forward: ScoredForward, column: int) -> Tensor:
        """[n] what every sequence contributes to a column, with its graph, in the dtype of the log-probs."""
        S, own = forward.sequence_logprobs, self.columns[column]
        if not self.by_token(column):
            return self.by_sequence[column].to(S.dtype) * S
        losses = torch.zeros_like(forward.token_logprobs)
        for weights, values in ((own.of_logprob, forward.token_logprobs), (own.of_entropy, forward.token_entropies)):
            if weights is not None:
                assert values is not None
                table = torch.zeros(forward.scored.shape, dtype=S.dtype, device=S.device)
                losses = losses + table.masked_scatter(forward.scored, weights.to(S.dtype)) * values
        return losses.sum(-1)


def power_of_two_scales(largest: Tensor) -> Tensor:
    """`power_of_two_scale` of every number by itself, [n]."""
    mantissa, _ = torch.frexp(largest)
    # Exact: numerator and denominator have the same mantissa.
    return torch.where(largest > 0, 2.0 * mantissa / largest, 1.0)


def power_of_two_scale(coefficients: Tensor) -> float:
    """The power of two that brings the largest |coefficient| into [1, 2); 1 when all are 0.

    Losses are multiplied by it before backward and gradients divided by it after. That changes no bit in fp32 and bf16,
    and in fp16 it keeps small coefficients (small advantages, large L_max) from vanishing below the smallest number.
    """
    largest = float(coefficients.abs().max())
    return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0
