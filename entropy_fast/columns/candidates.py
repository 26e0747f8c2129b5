"""Other updates to compare with the one that is planned: ready ones, and the column of any.

Legend: A_i advantage, a_t and e_t coefficients of ∇s_t and ∇H_t in the planned update, w_i length weight, G responses of the
prompt, s_t log-prob and H_t entropy of response token t, π_old the policy that sampled.

Clip-Cov and KL-Cov act where advantage and log-prob vary together, (A - mean A)(s_t - mean s), means over the batch's response
tokens; those are the tokens by which, to first order and one token at a time, an update lowers entropy most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import Column, ColumnDefaults, ScoredTokens, Side, log_ratios_of
from entropy_fast.columns.given import GivenUpdate, LossFunction, given_update
from entropy_fast.columns.lengths import length_weights
from entropy_fast.columns.scores import ResolvedColumn, TokenScores, weigh_whole
from entropy_fast.columns.update import PolicyGradient
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import ConfigError, RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["Candidate", "candidate_column", "clip_cov", "clip_higher", "entropy_bonus", "kl_cov", "reweighted"]


@dataclasses.dataclass(frozen=True)
class TokenUpdate:
    """Coefficients of a whole batch's M response tokens, as they are changed by a candidate.

    Attributes:
        scored: what the policy says of them.
        of_logprob: [M] a_t, fp64 on the CPU; without the part of a KL term that options describe.
        of_entropy: [M] e_t, likewise.
        advantages: [M] A of every token: its response's, times the token's weight where the rollouts have some; likewise.
        lengths: [M] w_i / G, likewise.
    """

    scored: ScoredTokens
    of_logprob: Tensor
    of_entropy: Tensor
    advantages: Tensor
    lengths: Tensor

    @property
    def covariance(self) -> Tensor:
        """[M] (A - mean A)(s_t - mean s)."""
        s = self.scored.logprobs.detach().double().cpu()
        return (self.advantages - self.advantages.mean()) * (s - s.mean())


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A change of the planned update.

    Attributes:
        change: of coefficients that are known.
        options: of options that describe the update; applied before it.
        says: what it does, in words.
    """

    change: Callable[[TokenUpdate], TokenUpdate] | None
    options: Callable[[EstimateOptions], EstimateOptions] | None
    says: str


def reweighted(positive: float = 1.0, negative: float = 1.0) -> Candidate:
    """Advantages above 0 times ``positive``, those below 0 times ``negative``.

    ``reweighted(positive=0.1)`` is W-REINFORCE; ``positive=0`` learns from negative samples alone (NSR).
    """

    def change(found: TokenUpdate) -> TokenUpdate:
        factor = torch.ones_like(found.advantages)
        factor[found.advantages > 0], factor[found.advantages < 0] = positive, negative
        return dataclasses.replace(found, of_logprob=found.of_logprob * factor)

    return Candidate(change, None, f"positive advantages times {positive:g}, negative ones times {negative:g}")


def entropy_bonus(coefficient: float) -> Candidate:
    """The planned loss less ``coefficient`` · w_i · H_t a token."""

    def change(found: TokenUpdate) -> TokenUpdate:
        return dataclasses.replace(found, of_entropy=found.of_entropy + coefficient * found.lengths)

    return Candidate(change, None, f"an entropy bonus of {coefficient:g}")


def clip_higher(high: float = 0.28, low: float = 0.2) -> Candidate:
    """Token ratios clipped at 1 + ``high`` and 1 - ``low``, as DAPO has it; needs ``old_logprobs``."""

    def options(planned: EstimateOptions) -> EstimateOptions:
        ratio = "token" if planned.importance_ratio == "none" else planned.importance_ratio
        return dataclasses.replace(planned, importance_ratio=ratio, clip_range=(low, high))

    return Candidate(None, options, f"ratios clipped at 1 + {high:g} and 1 - {low:g}")


def clip_cov(share: float = 2e-4, low: float = 1.0, high: float = 5.0, seed: int = 0) -> Candidate:
    """A share of all tokens, drawn at random from those whose covariance lies between the limits, sends nothing back.

    Raises:
        ConfigError: the share is not in (0, 1], or nothing lies between the limits.
    """
    _check_share("clip_cov", share)
    if not low < high:
        raise ConfigError(
            f"updates: clip_cov has low={low} and high={high}.", fix="use limits of which the first is the lower one."
        )

    def change(found: TokenUpdate) -> TokenUpdate:
        covariance = found.covariance
        within = ((covariance > low) & (covariance < high)).nonzero().flatten()
        count = min(len(within), max(1, int(share * len(covariance))))
        drawn = within[torch.randperm(len(within), generator=torch.Generator().manual_seed(seed))[:count]]
        kept = torch.ones_like(covariance).index_fill(0, drawn, 0.0)
        return dataclasses.replace(found, of_logprob=found.of_logprob * kept)

    return Candidate(change, None, f"{share:.3g} of the tokens with covariance in ({low:g}, {high:g}) left out")


def kl_cov(share: float = 2e-3, coefficient: float = 1.0) -> Candidate:
    """The share of tokens with the largest covariance pays ``coefficient`` · w_i · |log πθ/π_old|; needs ``old_logprobs``.

    Where θ has not moved since it sampled that penalty has no gradient, and nothing changes.

    Raises:
        ConfigError: the share is not in (0, 1].
    """
    _check_share("kl_cov", share)

    def change(found: TokenUpdate) -> TokenUpdate:
        log_ratios = log_ratios_of(found.scored)
        if log_ratios is None:
            raise RolloutsError(
                "updates: kl_cov needs the update batch's `old_logprobs`, and these rollouts have none.",
                fix="pass old_logprobs [N, T], the sampler's log-probs.",
            )
        covariance = found.covariance
        chosen = covariance.topk(max(1, int(share * len(covariance)))).indices
        penalty = torch.zeros_like(covariance).index_copy(0, chosen, log_ratios.sign()[chosen])
        return dataclasses.replace(found, of_logprob=found.of_logprob - coefficient * found.lengths * penalty)

    return Candidate(
        change, None, f"a penalty of {coefficient:g} on the {share:.3g} of tokens with the largest covariance"
    )


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(
            f"updates: {name} has share={share}.", fix="use a share of all response tokens, above 0 and at most 1."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ChangedUpdate(ColumnDefaults):
    """The planned update under a candidate's change: a column once scores are known, see `ResolvedColumn`.

    Args:
        planned: column of the planned update.
        change: of its coefficients.
        options: of the estimate.
        name: what results call it.
    """

    planned: Column
    change: Callable[[TokenUpdate], TokenUpdate]
    options: EstimateOptions
    name: str
    side: ClassVar[Side] = Side.UPDATE
    by_token: ClassVar[bool] = True
    needs_entropies: ClassVar[bool] = True

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`."""
        self.planned.check(rollouts)

    def resolved(self, scores: TokenScores, rollouts: Rollouts) -> Column:
        """See `ResolvedColumn.resolved`."""
        planned = self.planned.resolved(scores, rollouts) if isinstance(self.planned, ResolvedColumn) else self.planned
        scored = scores.of_all(rollouts)
        places, own = scored.places, planned.weigh(scored)
        assert rollouts.advantages is not None
        a = own.by_sequence[places.sequence] if own.of_logprob is None else own.of_logprob
        kept = torch.zeros_like(a)
        if isinstance(planned, PolicyGradient) and planned.options.kl_coefficient != 0:
            # What a candidate does to advantages it does not do to the KL term.
            without = dataclasses.replace(planned, options=dataclasses.replace(planned.options, kl_coefficient=0.0))
            plain = without.weigh(scored)
            free = plain.by_sequence[places.sequence] if plain.of_logprob is None else plain.of_logprob
            a, kept = free, a - free
        e = torch.zeros_like(a) if own.of_entropy is None else own.of_entropy
        lengths = length_weights(rollouts, self.options.of_update) / places.group_size
        advantages = rollouts.advantages.to(device="cpu", dtype=torch.float64)[places.sequence]
        weights = rollouts.of_response_tokens("token_weights", scored.rows)
        advantages = advantages if weights is None else advantages * weights
        found = self.change(TokenUpdate(scored, a, e, advantages, lengths[places.sequence]))
        mask = rollouts.loss_mask.cpu() == 1
        # A given update is that of the whole batch, where prompts' gradients are averaged.
        tables = [
            torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values / rollouts.n_prompts)
            for values in (found.of_logprob + kept, found.of_entropy)
        ]
        return GivenUpdate(tables[0], tables[1] if bool((found.of_entropy != 0).any()) else None, self.name)

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `ResolvedColumn`."""
        return weigh_whole(self, scored)


def candidate_column(
    candidate: Candidate | LossFunction | Tensor | tuple[Tensor, Tensor],
    planned: Column,
    options: EstimateOptions,
    rollouts: Rollouts,
    name: str,
) -> Column:
    """The column of a candidate.

    Args:
        candidate: a change of the planned update; or a loss or coefficients, as `given_update` takes them.
        planned: column of the planned update.
        options: of the estimate.
        rollouts: the update batch as it was given.
        name: what results call it.

    Raises:
        ConfigError: it is none of these, or changes options where the update is given.
    """
    if not isinstance(candidate, Candidate):
        return given_update(candidate, rollouts, name)
    if candidate.options is not None:
        if not isinstance(planned, PolicyGradient):
            raise ConfigError(
                f"updates: {name!r} changes options that describe the update, and `update` gives one.",
                fix="give this candidate as a loss function too.",
            )
        planned = dataclasses.replace(planned, options=candidate.options(options), name=name)
    if candidate.change is None:
        return planned
    return ChangedUpdate(planned, candidate.change, options, name)
