"""The entropy as a functional column: its score-function gradient, and its Rao-Blackwell gradient from token entropies.

Legend: S_i sequence log-prob, s_t log-prob of response token t and H_t the entropy of the distribution it was drawn from
(nats), w_i length weight, G responses of the prompt, m_t 1 at tokens whose entropy counts and 0 at others, R an offset. Score
function, with a leave-one-out baseline within the prompt:

    c_i = -(w_i S_i - mean_{j != i} w_j S_j) / G

Rao-Blackwell, for w_i that do not depend on the response (`dr_grpo` with a given budget, `sequence`, `pooled`):

    e_t = w_i m_t / G,      c_t = (w_i Σ_{k > t} m_k (H_k - R) - b_t) / G

with b_t a baseline that does not depend on token t and what follows (`columns.baselines`): the mean of the same over the
prompt's other responses that have a token t, or what is to come after tokens of like entropy and position of other prompts.
What came before token t does not depend on it, which is why the sum starts after it. With w_i = 1/L_i (`per_token`) all of it
does, through the length: c_t = (w_i Σ_k m_k H_k - b_t) / G. Then E X_n is the gradient of E[w Σ_k H_k].

The mean over all tokens that trainers log is a ratio, R = E[Σ_k m_k H_k] / E[Σ_k m_k], and its gradient is that of
E[Σ_k m_k (H_k - R)] / E[Σ_k m_k] at R held fixed: the offset is how the denominator's gradient comes in. With S_i in the place
of entropies, the score function weighs w_i (S_i + R L_i). R is 0 for every other weighting.

docs/theory.md derives all of it and says what it estimates when w_i depends on the sample's own length.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.columns.baselines import of_other_prompts, of_other_responses
from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import Column, ColumnDefaults, ScoredTokens, Side
from entropy_fast.columns.functional import leave_one_out
from entropy_fast.columns.lengths import check_group_sizes, length_weights
from entropy_fast.columns.scores import TokenScores, weigh_whole
from entropy_fast.columns.tokens import TokenPlaces
from entropy_fast.config import Weighting
from entropy_fast.rollouts import Rollouts

__all__ = ["BatchEntropy", "DirectEntropy", "EntropyMeasure", "RaoBlackwellEntropy", "ScoreFunctionEntropy"]


@dataclasses.dataclass(frozen=True, eq=False)
class EntropyMeasure:
    """Which entropy is meant.

    Args:
        weighting: which w_i.
        mask: [N, T] m_t, in the columns of the batch; None for every response token.
        offset: R, nats per token.
    """

    weighting: Weighting
    mask: Tensor | None = None
    offset: float = 0.0

    def counted(self, rollouts: Rollouts, rows: Tensor) -> Tensor | None:
        """[M] m_t of the response tokens of some rows, fp64; None where all count."""
        if self.mask is None:
            return None
        return self.mask[rows][rollouts.loss_mask.cpu()[rows] == 1].to(torch.float64)

    def lengths(self, rollouts: Rollouts) -> Tensor:
        """[N] Σ_k m_k, fp64."""
        counted = rollouts.response_lengths if self.mask is None else (self.mask * rollouts.loss_mask.cpu()).sum(-1)
        return counted.to(torch.float64)

    def weights(self, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """[n] w_i of some rows, fp64."""
        return length_weights(rollouts, self.weighting, self.lengths(rollouts))[rows]

    def to_come(self, scored: ScoredTokens) -> Tensor:
        """[M] what a token's choice may change: w_i Σ_{k > t} m_k (H_k - R), or the whole sum where w_i is 1/L_i; fp64, CPU."""
        assert scored.entropies is not None
        places, counted = scored.places, self.counted(scored.rollouts, scored.rows)
        values = scored.entropies.detach().to(device="cpu", dtype=torch.float64) - self.offset
        table = places.table(values if counted is None else values * counted)
        total = table.sum(1, keepdim=True)
        # With 1/L_i all of it depends on what is drawn, through the length.
        found = total.expand_as(table) if self.weighting == "per_token" else total - table.cumsum(1)
        weighted = self.weights(scored.rollouts, scored.rows).unsqueeze(1) * found
        return weighted[places.sequence, places.column]

    def level(self, rollouts: Rollouts, sums: Tensor) -> float:
        """The entropy now, from [N] Σ_k m_k H_k: the mean over prompts of the means over their responses of w_i Σ_k m_k H_k."""
        weighted = length_weights(rollouts, self.weighting, self.lengths(rollouts)) * sums
        means = [weighted[rollouts.rows_of_prompt(n)].mean() for n in range(rollouts.n_prompts)]
        return float(torch.stack(means).mean())


@dataclasses.dataclass(frozen=True)
class ScoreFunctionEntropy(ColumnDefaults):
    """From sequence log-probs.

    Args:
        measure: which entropy; of all response tokens.
    """

    measure: EntropyMeasure
    name: ClassVar[str] = "entropy"
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = False
    needs_entropies: ClassVar[bool] = False

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: every prompt needs the two responses of the leave-one-out baseline."""
        check_group_sizes(rollouts)

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        S, rollouts, rows = scored.sequence_logprobs.detach(), scored.rollouts, scored.rows
        less = self.measure.offset * self.measure.lengths(rollouts)[rows]
        weighted = self.measure.weights(rollouts, rows).to(S.device) * (S.to(torch.float64) + less.to(S.device))
        return ColumnWeights(-leave_one_out(weighted, scored.places))


class _OfTokenEntropies(ColumnDefaults):
    """What columns from the entropies of tokens have in common."""

    measure: EntropyMeasure
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = True
    needs_entropies: ClassVar[bool] = True

    def counted(self, scored: ScoredTokens) -> Tensor | None:
        """See `Column.counted`."""
        return self.measure.counted(scored.rollouts, scored.rows)


@dataclasses.dataclass(frozen=True, eq=False)
class RaoBlackwellEntropy(_OfTokenEntropies):
    """From the entropy of the model's distribution at every response token.

    Args:
        measure: which entropy.
        baseline: [N, T] b_t of every response token, in the columns of the batch; None for the mean over the prompt's other
            responses.
    """

    measure: EntropyMeasure
    baseline: Tensor | None = None
    name: ClassVar[str] = "entropy"

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: a single response has no baseline, which it needs for its variance alone."""

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        device, places, counted = scored.logprobs.device, scored.places, self.counted(scored)
        weights = self.measure.weights(scored.rollouts, scored.rows)
        to_come = self.measure.to_come(scored)
        if self.baseline is None:
            b = of_other_responses(to_come, places, of_whole=self.measure.weighting == "per_token")
        else:
            table = self.baseline[scored.rows]
            b = table[scored.rollouts.loss_mask.cpu()[scored.rows] == 1]
        c = (to_come - b) / places.group_size[places.sequence]
        e = _direct(places, weights, counted)
        return ColumnWeights(places.means(c).to(device), c.to(device), e.to(device))


@dataclasses.dataclass(frozen=True)
class DirectEntropy(_OfTokenEntropies):
    """The part of the Rao-Blackwell gradient that is about how distributions change at the prefixes that were visited.

    Without coefficients of ∇s_t, which are about how often prefixes are visited. It has no baseline and needs none.

    Args:
        measure: which entropy.
    """

    measure: EntropyMeasure
    name: ClassVar[str] = "direct"

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: it can always be formed."""

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        places, device = scored.places, scored.logprobs.device
        weights = self.measure.weights(scored.rollouts, scored.rows)
        e = _direct(places, weights, self.counted(scored))
        return ColumnWeights(torch.zeros_like(weights).to(device), None, e.to(device))


@dataclasses.dataclass(frozen=True)
class BatchEntropy(ColumnDefaults):
    """An entropy that is known when the whole batch is: the column of its gradient once R and b_t are, see `ResolvedColumn`.

    Args:
        column: that column, without them.
        fitted: whether b_t comes from the other prompts.
    """

    column: ScoreFunctionEntropy | RaoBlackwellEntropy
    fitted: bool
    side: ClassVar[Side] = Side.FUNCTIONAL
    # Both are made of entropies, whatever the column is made of.
    needs_entropies: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """See `Column.name`."""
        return self.column.name

    @property
    def by_token(self) -> bool:
        """See `Column.by_token`."""
        return self.column.by_token

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`."""
        self.column.check(rollouts)

    def resolved(self, scores: TokenScores, rollouts: Rollouts) -> Column:
        """See `ResolvedColumn.resolved`."""
        measure = self.column.measure
        if measure.weighting == "pooled":
            entropies = scores.entropies.double().cpu()
            counted = entropies if measure.mask is None else entropies * measure.mask
            offset = float(counted.sum()) / max(float(measure.lengths(rollouts).sum()), 1.0)
            measure = dataclasses.replace(measure, offset=offset)
        if isinstance(self.column, ScoreFunctionEntropy):
            return ScoreFunctionEntropy(measure)
        return RaoBlackwellEntropy(measure, self._baseline(measure, scores, rollouts) if self.fitted else None)

    @staticmethod
    def _baseline(measure: EntropyMeasure, scores: TokenScores, rollouts: Rollouts) -> Tensor:
        scored = scores.of_all(rollouts)
        assert scored.entropies is not None
        b = of_other_prompts(measure.to_come(scored), scored.entropies.double(), scored.places)
        mask = rollouts.loss_mask.cpu() == 1
        return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, b)

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `ResolvedColumn`."""
        return weigh_whole(self, scored)


def _direct(places: TokenPlaces, weights: Tensor, counted: Tensor | None) -> Tensor:
    """[M] e_t from weights [n] and, where not all tokens count, m_t [M]."""
    e = (weights / places.group_size)[places.sequence]
    return e if counted is None else e * counted
