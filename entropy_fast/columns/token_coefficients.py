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

from entropy_fast.columns.coefficients import (
    Coefficients,
    RatioTable,
    TokenCoefficients,
    length_weights,
    sequence_coefficients,
)
from entropy_fast.columns.losses import ScoredForward
from entropy_fast.config import ProbeConfig
from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["ScoredTokens", "check_old_logprobs", "coefficients_of"]

LARGEST_LOG_RATIO = 20.0  # nats; what is above it is no policy that sampled this token


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


def check_old_logprobs(config: ProbeConfig, update: Rollouts) -> None:
    """Raise unless an update batch has what ``config`` asks for.

    Raises:
        RolloutsError: importance ratios are asked for, and ``old_logprobs`` are missing.
    """
    if config.importance_ratio == "token" and update.old_logprobs is None:
        raise RolloutsError(
            "importance_ratio='token' needs the update batch's `old_logprobs`, and these rollouts have none.",
            fix="pass old_logprobs [N, T], the sampler's log-probs at temperature 1 (in a file: `old_logprobs` in every row), "
            "or importance_ratio='none'.",
        )


def coefficients_of(
    config: ProbeConfig, rollouts: Rollouts, rows: Tensor, scored: ScoredTokens, labels: str = "XY"
) -> Coefficients:
    """Coefficients of the given rows, which must be all the rows of their prompts; by token where ``config`` asks for that.

    What is not wanted may stay unknown, and is NaN: c_t without entropies, a_t without ``old_logprobs``.

    Args:
        config: estimator, weighting and importance ratios.
        rollouts: where advantages, groups and the log-probs of π_old are.
        rows: [n] row indices.
        scored: what the forward of these rows said; detached here.
        labels: which of X and Y is wanted.

    Raises:
        RolloutsError: the update is wanted with importance ratios, and ``old_logprobs`` are missing or cannot be meant.
    """
    if "Y" in labels:
        check_old_logprobs(config, rollouts)
    weights = length_weights(rollouts, config.weighting)
    whole = sequence_coefficients(scored.sequence_logprobs, rows, rollouts, weights)
    if rollouts.old_logprobs is None and not config.coefficients_by_token:
        return whole
    device = scored.logprobs.device
    places = _Places.of(rollouts, rows)
    plain = whole.update.cpu()[places.sequence]  # what a_t is where the ratio is 1; its sign is the advantage's
    log_ratios = clipped = ratios = None
    if rollouts.old_logprobs is not None:
        now = scored.logprobs.detach().to(device="cpu", dtype=torch.float64)
        log_ratios = now - rollouts.old_response_logprobs(rows)
        clipped = _clipped(config, log_ratios, plain)
        ratios = RatioTable(
            places.means(log_ratios.abs()), places.table(log_ratios.abs()).amax(1), places.means(clipped.double())
        )
    if not config.coefficients_by_token:
        return dataclasses.replace(whole, ratios=ratios)
    # For one response the leave-one-out baseline of the score function is 0/0; token entropies need none.
    entropy, direct = whole.entropy.cpu()[places.sequence], None
    if config.wants_token_entropies and scored.entropies is not None:
        table = places.table(scored.entropies.detach().to(device="cpu", dtype=torch.float64))
        entropy, direct = _rao_blackwell(table, places, weights[rows], to_go=config.weighting != "per_token")
    elif config.wants_token_entropies:
        entropy = torch.full_like(entropy, torch.nan)
    update = plain
    if config.importance_ratio == "token":
        if "Y" in labels and log_ratios is not None:
            _refuse_ratios(rollouts, rows, places, log_ratios, scored.logprobs)
        update = torch.full_like(update, torch.nan)
        if log_ratios is not None and clipped is not None:
            ratio = torch.where(log_ratios > LARGEST_LOG_RATIO, torch.nan, log_ratios.exp())
            update = torch.where(clipped | (plain == 0), 0.0, plain * ratio)
    return Coefficients(
        places.means(entropy).to(device),
        places.means(update).to(device),
        TokenCoefficients(
            places.sequence.to(device),
            entropy.to(device),
            None if direct is None else direct.to(device),
            update.to(device),
        ),
        ratios,
    )


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the M tokens stand in a table [n, longest], and which sequences share a prompt; on the CPU.

    There a sum along a row has one order; a running sum on CUDA need not.

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
    def of(cls, rollouts: Rollouts, rows: Tensor) -> _Places:
        lengths = rollouts.response_lengths[rows]
        column = torch.cat([torch.arange(length) for length in lengths.tolist()])
        sequence = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        _, local = torch.unique(rollouts.prompt_index[rows], return_inverse=True)
        return cls(sequence, column, torch.nn.functional.one_hot(local).to(torch.float64), int(lengths.max()))

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
    # What one response is compared with must not depend on it. Where others have ended nothing is to come: they are left out.
    compared = exists if to_go else torch.ones_like(exists)
    weighted = weights.unsqueeze(1) * (total - entropies.cumsum(1) if to_go else total) * compared
    others = places.member @ places.member.T
    size = others.sum(1)
    others.fill_diagonal_(0.0)
    baseline = (others @ weighted) / (others @ compared).clamp_min(1.0)
    coefficients = (weighted - baseline) / size.unsqueeze(1)
    return coefficients[places.sequence, places.column], (weights / size)[places.sequence]


def _clipped(config: ProbeConfig, log_ratios: Tensor, plain: Tensor) -> Tensor:
    """[M] bool, whether clipping leaves a token out."""
    if config.clip_range is None:
        return torch.zeros_like(log_ratios, dtype=torch.bool)
    low, high = config.clip_range
    ratio = log_ratios.exp()
    return ((ratio > 1 + high) & (plain > 0)) | ((ratio < 1 - low) & (plain < 0))


def _refuse_ratios(rollouts: Rollouts, rows: Tensor, places: _Places, log_ratios: Tensor, logprobs: Tensor) -> None:
    worst = int(log_ratios.argmax())
    if float(log_ratios[worst]) > LARGEST_LOG_RATIO:
        row, now = int(rows[places.sequence[worst]]), float(logprobs.detach()[worst])
        group = rollouts.group_order[int(rollouts.prompt_index[row])]
        raise RolloutsError(
            f"Rollouts: `old_logprobs` is {now - float(log_ratios[worst]):.6g} at response token {int(places.column[worst])} "
            f"of a response to group {group} (row {row}, empty responses not counted), where the model's log-prob is "
            f"{now:.6g}: a ratio of e^{float(log_ratios[worst]):.3g}.",
            fix="pass the log-prob that the sampler gave to this very token, in its own column; no placeholder such as -9999.",
        )
