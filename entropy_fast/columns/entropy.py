"""The entropy as a functional column: its score-function gradient, and its Rao-Blackwell gradient from token entropies.

Legend: S_i sequence log-prob, s_t log-prob of response token t and H_t the entropy of the distribution it was drawn from
(nats), w_i length weight, G responses of the prompt. Score function, with a leave-one-out baseline within the prompt:

    c_i = -(w_i S_i - mean_{j != i} w_j S_j) / G

Rao-Blackwell, for w_i that do not depend on the response (`dr_grpo` with a given budget, `sequence`):

    e_t = w_i / G,      c_t = (w_i Σ_{k > t} H_k - b_t) / G

with b_t the mean of w_j Σ_{k > t} H_k over the prompt's other responses that have a token t (0 where none has). What came
before token t does not depend on it, which is why the sum starts after it. With w_i = 1/L_i (`per_token`) all of it does,
through the length: c_t = (w_i Σ_k H_k - mean_{j != i} w_j Σ_k H_k) / G. Then E X_n is the gradient of E[w Σ_k H_k].
docs/theory.md derives both and says what they estimate when w_i depends on the sample's own length.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import ScoredTokens, Side
from entropy_fast.columns.functional import leave_one_out
from entropy_fast.columns.lengths import check_group_sizes, length_weights
from entropy_fast.columns.tokens import TokenPlaces
from entropy_fast.config import Weighting
from entropy_fast.rollouts import Rollouts

__all__ = ["DirectEntropy", "RaoBlackwellEntropy", "ScoreFunctionEntropy"]


@dataclasses.dataclass(frozen=True)
class ScoreFunctionEntropy:
    """From sequence log-probs.

    Args:
        weighting: which w_i.
    """

    weighting: Weighting
    name: ClassVar[str] = "entropy"
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = False
    needs_entropies: ClassVar[bool] = False

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: every prompt needs the two responses of the leave-one-out baseline."""
        check_group_sizes(rollouts)

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        S = scored.sequence_logprobs.detach()
        weighted = length_weights(scored.rollouts, self.weighting)[scored.rows].to(S.device) * S.to(torch.float64)
        return ColumnWeights(-leave_one_out(weighted, scored.places))

    def clipped(self, scored: ScoredTokens, log_ratios: Tensor) -> None:
        """See `Column.clipped`: nothing."""


@dataclasses.dataclass(frozen=True)
class RaoBlackwellEntropy:
    """From the entropy of the model's distribution at every response token.

    Args:
        weighting: which w_i.
    """

    weighting: Weighting
    name: ClassVar[str] = "entropy"
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = True
    needs_entropies: ClassVar[bool] = True

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: a single response has no baseline, which it needs for its variance alone."""

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        assert scored.entropies is not None
        device, places = scored.logprobs.device, scored.places
        entropies = places.table(scored.entropies.detach().to(device="cpu", dtype=torch.float64))
        weights = length_weights(scored.rollouts, self.weighting)[scored.rows]
        c, e = _rao_blackwell(entropies, places, weights, to_go=self.weighting != "per_token")
        return ColumnWeights(places.means(c).to(device), c.to(device), e.to(device))

    def clipped(self, scored: ScoredTokens, log_ratios: Tensor) -> None:
        """See `Column.clipped`: nothing."""


@dataclasses.dataclass(frozen=True)
class DirectEntropy:
    """The part of the Rao-Blackwell gradient that is about how distributions change at the prefixes that were visited.

    Without coefficients of ∇s_t, which are about how often prefixes are visited. It has no baseline and needs none.

    Args:
        weighting: which w_i.
    """

    weighting: Weighting
    name: ClassVar[str] = "direct"
    side: ClassVar[Side] = Side.FUNCTIONAL
    by_token: ClassVar[bool] = True
    needs_entropies: ClassVar[bool] = True

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`: it can always be formed."""

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`."""
        places, device = scored.places, scored.logprobs.device
        weights = length_weights(scored.rollouts, self.weighting)[scored.rows] / places.group_size
        return ColumnWeights(torch.zeros_like(weights).to(device), None, weights[places.sequence].to(device))

    def clipped(self, scored: ScoredTokens, log_ratios: Tensor) -> None:
        """See `Column.clipped`: nothing."""


def _rao_blackwell(entropies: Tensor, places: TokenPlaces, weights: Tensor, *, to_go: bool) -> tuple[Tensor, Tensor]:
    """[M] c_t and e_t from a table [n, longest] of entropies and weights [n]; with what is to come, or with the whole sum."""
    exists = places.table(entropies.new_ones(len(places.sequence)))
    total = entropies.sum(1, keepdim=True)
    # What one response is compared with must not depend on it. Where others have ended nothing is to come: they are left out.
    compared = exists if to_go else torch.ones_like(exists)
    weighted = weights.unsqueeze(1) * (total - entropies.cumsum(1) if to_go else total) * compared
    others = places.member @ places.member.T
    others.fill_diagonal_(0.0)
    baseline = (others @ weighted) / (others @ compared).clamp_min(1.0)
    coefficients = (weighted - baseline) / places.group_size.unsqueeze(1)
    return coefficients[places.sequence, places.column], (weights / places.group_size)[places.sequence]
