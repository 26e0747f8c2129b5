"""Coefficients that differ from token to token: the Rao-Blackwell entropy gradient, and token-level importance ratios.

Legend: s_t log-prob of response token t and H_t the entropy of the distribution it was drawn from (nats), w_i length
weight, A_i advantage, G responses of the prompt, π_old the policy that sampled, ε clip range.

    X_n = Σ_{i in n} Σ_t (c_t ∇s_t + e_t ∇H_t),      g_n = Σ_{i in n} Σ_t a_t ∇s_t

Rao-Blackwell, for w_i that do not depend on the response (`dr_grpo` with a given budget, `sequence`):

    e_t = w_i / G,      c_t = (w_i Σ_{k > t} H_k - b_t) / G

with b_t the mean of w_j Σ_{k > t} H_k over the prompt's other responses that have a token t (0 where none has). What came
before token t does not depend on it, which is why the sum starts after it. With w_i = 1/L_i (`per_token`) all of it does,
through the length: c_t = (w_i Σ_k H_k - mean_{j != i} w_j Σ_k H_k) / G. Then E X_n is the gradient of E[w Σ_k H_k].

Importance ratios, r_t = πθ/π_old of token t:

    a_t = A_i w_i r_t / G, and 0 where r_t > 1 + ε_high with A_i > 0, or r_t < 1 - ε_low with A_i < 0

which is the gradient of Σ_t min(r_t A_i, clip(r_t, 1 - ε_low, 1 + ε_high) A_i) w_i / G. docs/theory.md derives the first.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from entropy_fast.config import ProbeConfig
from entropy_fast.engines.coefficients import Coefficients, TokenCoefficients, length_weights, sequence_coefficients
from entropy_fast.engines.probe_losses import ScoredForward
from entropy_fast.rollouts import Rollouts

__all__ = ["ScoredTokens", "coefficients_of"]


@dataclasses.dataclass(frozen=True)
class ScoredTokens:
    """What a forward said about n sequences with M response tokens in all, sequence by sequence.

    Attributes:
        sequence_logprobs: [n] S_i, nats.
        logprobs: [M] s_t, nats.
        entropies: [M] H_t, nats; None where they were not asked for.
    """

    sequence_logprobs: Tensor
    logprobs: Tensor
    entropies: Tensor | None

    @classmethod
    def of(cls, forward: ScoredForward) -> ScoredTokens:
        """Of a padded forward, detached."""
        H = forward.token_entropies
        return cls(
            forward.sequence_logprobs.detach(),
            forward.token_logprobs.detach()[forward.scored],
            None if H is None else H.detach()[forward.scored],
        )


def coefficients_of(config: ProbeConfig, rollouts: Rollouts, rows: Tensor, scored: ScoredTokens) -> Coefficients:
    """Coefficients of the given rows, which must be all the rows of their prompts; by token where ``config`` asks for that.

    Args:
        config: estimator, weighting and importance ratios.
        rollouts: where advantages, groups and the log-probs of π_old are.
        rows: [n] row indices.
        scored: what the forward of these rows said; detached here.
    """
    weights = length_weights(rollouts, config.weighting)
    whole = sequence_coefficients(scored.sequence_logprobs, rows, rollouts, weights)
    if not config.coefficients_by_token:
        return whole
    places = _Places.of(rollouts, rows, scored.logprobs.device)
    entropy, direct = whole.entropy[places.sequence], None
    if config.wants_token_entropies:
        assert scored.entropies is not None
        table = places.table(scored.entropies.detach().to(torch.float64))
        own = weights[rows].to(table.device)
        entropy, direct = _rao_blackwell(table, places, own, to_go=config.weighting != "per_token")
    update = whole.update[places.sequence]
    if config.importance_ratio == "token":
        logprobs = scored.logprobs.detach().to(torch.float64)
        # An entropy batch need not say what sampled it: its update coefficients are not used, and not known.
        known = rollouts.old_logprobs is not None
        ratios = _ratios(config, rollouts, rows, logprobs, update) if known else torch.full_like(update, torch.nan)
        update = update * ratios
    tokens = TokenCoefficients(places.sequence, entropy, direct, update)
    return Coefficients(places.means(entropy), places.means(update), tokens)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the M tokens stand in a table [n, longest], and which sequences share a prompt.

    Attributes:
        sequence, column: [M].
        member: [n, prompts] 1 where a sequence answers a prompt, fp64.
        longest: columns of the table.
    """

    sequence: Tensor
    column: Tensor
    member: Tensor
    longest: int

    @classmethod
    def of(cls, rollouts: Rollouts, rows: Tensor, device: torch.device) -> _Places:
        lengths = rollouts.response_lengths[rows]
        column = torch.cat([torch.arange(length) for length in lengths.tolist()])
        sequence = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        _, local = torch.unique(rollouts.prompt_index[rows], return_inverse=True)
        member = torch.nn.functional.one_hot(local).to(torch.float64)
        return cls(sequence.to(device), column.to(device), member.to(device), int(lengths.max()))

    def table(self, values: Tensor) -> Tensor:
        """[n, longest] of values [M]; 0 elsewhere."""
        table = values.new_zeros(len(self.member), self.longest)
        table[self.sequence, self.column] = values
        return table

    def means(self, values: Tensor) -> Tensor:
        """[n] of values [M], over the tokens of each sequence."""
        return self.table(values).sum(1) / self.table(torch.ones_like(values)).sum(1)


def _rao_blackwell(entropies: Tensor, places: _Places, weights: Tensor, *, to_go: bool) -> tuple[Tensor, Tensor]:
    """[M] c_t and e_t from a table [n, longest] of entropies and weights [n]; with what is to come, or with the whole sum."""
    exists = places.table(entropies.new_ones(len(places.sequence)))
    total = entropies.sum(1, keepdim=True)
    following = total - entropies.cumsum(1) if to_go else total.expand_as(entropies)
    weighted = weights.unsqueeze(1) * following * exists
    others = places.member @ places.member.T
    size = others.sum(1)
    others.fill_diagonal_(0.0)
    # What one response is compared with must not depend on it: where it ends, the others may go on, and are left out.
    compared = exists if to_go else torch.ones_like(exists)
    weighted_others = weighted if to_go else weights.unsqueeze(1) * following
    count = others @ compared
    baseline = (others @ weighted_others) / count.clamp_min(1.0)
    coefficients = (weighted - baseline) / size.unsqueeze(1)
    return coefficients[places.sequence, places.column], (weights / size)[places.sequence]


def _ratios(config: ProbeConfig, rollouts: Rollouts, rows: Tensor, logprobs: Tensor, update: Tensor) -> Tensor:
    """[M] r_t, and 0 where it is clipped; the sign of ``update`` is that of the advantage."""
    ratio = (logprobs - rollouts.old_response_logprobs(rows).to(logprobs)).exp()
    if config.clip_range is None:
        return ratio
    low, high = config.clip_range
    clipped = ((ratio > 1 + high) & (update > 0)) | ((ratio < 1 - low) & (update < 0))
    return torch.where(clipped, 0.0, ratio)
