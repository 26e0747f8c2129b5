"""Coefficients: what turns ∇S_i into entropy and update gradients.

Legend: S_i sequence log-prob (nats), w_i length weight, c_i entropy coefficient, a_i update coefficient, A_i advantage,
G responses of the prompt.

    c_i = -(w_i S_i - mean_{j != i} w_j S_j) / G        (leave-one-out baseline within the prompt, detached)
    a_i = A_i w_i / G
    X_n = Σ_{i in n} c_i ∇S_i,   g_n = Σ_{i in n} a_i ∇S_i

The first is the score-function (REINFORCE) gradient of the entropy with a leave-one-out baseline; docs/theory.md derives
it and says what it estimates when w_i depends on the sample's own length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.config import Weighting
from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = [
    "Coefficients",
    "RatioTable",
    "SequenceTable",
    "TokenCoefficients",
    "check_group_sizes",
    "labels_of",
    "length_weights",
    "power_of_two_scale",
    "power_of_two_scales",
    "scales_of",
    "sequence_coefficients",
]


@dataclasses.dataclass(frozen=True)
class TokenCoefficients:
    """Coefficients of the M response tokens of n sequences (`token_coefficients`), sequence by sequence; detached, fp64.

    Attributes:
        sequence: [M] place of every token's sequence, ascending.
        entropy: [M] c_t, of ∇s_t in X.
        entropy_direct: [M] e_t, of ∇H_t in X; None where X has no such part.
        update: [M] a_t, of ∇s_t in g.
    """

    sequence: Tensor
    entropy: Tensor
    entropy_direct: Tensor | None
    update: Tensor

    def of(self, label: int) -> tuple[Tensor, Tensor | None]:
        """[M] of ∇s_t and of ∇H_t in X (``label`` 0) or g (1)."""
        return (self.entropy, self.entropy_direct) if label == 0 else (self.update, None)


@dataclasses.dataclass(frozen=True)
class RatioTable:
    """How far πθ has moved from ``old_logprobs``, by sequence; log r_t = s_t - s_t^old. All [N], fp64, CPU.

    Attributes:
        mean_log_ratio: mean |log r_t| over the response, nats per token.
        largest_log_ratio: the largest, nats.
        clipped: share of the response's tokens that ``clip_range`` leaves out of the update.
    """

    mean_log_ratio: Tensor
    largest_log_ratio: Tensor
    clipped: Tensor

    @classmethod
    def empty(cls, n: int) -> RatioTable:
        """A table of n sequences, all unknown."""
        return cls(*(torch.full((n,), torch.nan, dtype=torch.float64) for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Coefficients of n sequences (whole prompts), detached, fp64.

    Attributes:
        entropy: [n] c_i; where coefficients differ from token to token, the mean of c_t (without e_t) over the sequence.
        update: [n] a_i; likewise that of a_t.
        tokens: those of the tokens; None where a sequence's tokens share one.
        ratios: how far the policy has moved since it sampled, [n]; None where the rollouts do not say.
    """

    entropy: Tensor
    update: Tensor
    tokens: TokenCoefficients | None = None
    ratios: RatioTable | None = None

    def rows(self, labels: str) -> Tensor:
        """[2, n] c and a, zero where X or Y is not among the ``labels``."""
        both = (("X", self.entropy), ("Y", self.update))
        return torch.stack([values if label in labels else torch.zeros_like(values) for label, values in both])

    @classmethod
    def joined(cls, parts: Sequence[Coefficients]) -> Coefficients:
        """Of successive sequences, for a `SequenceTable`: without those of tokens."""
        ratios = [vars(part.ratios).values() for part in parts if part.ratios is not None]
        return cls(
            torch.cat([part.entropy for part in parts]),
            torch.cat([part.update for part in parts]),
            ratios=RatioTable(*map(torch.cat, zip(*ratios, strict=True))) if ratios else None,
        )

    def largest(self, label: int) -> Tensor:
        """[n] the largest |coefficient| of every sequence in X (``label`` 0) or g (1)."""
        if self.tokens is None:
            return (self.entropy, self.update)[label].abs()
        largest = torch.zeros_like(self.entropy)
        for values in self.tokens.of(label):
            if values is not None:
                largest = largest.scatter_reduce(0, self.tokens.sequence, values.abs(), "amax")
        return largest


def labels_of(labels: str) -> list[int]:
    """0 and 1 for what is there of X and Y."""
    return [number for number, label in enumerate("XY") if label in labels]


def scales_of(coefficients: Coefficients, label: int) -> tuple[Tensor, Tensor]:
    """[n] what a sequence's part of X (``label`` 0) or g (1) is scaled by on its way back, and what undoes it.

    The second is [2, n], as rows of coefficients are: 1 over the scales in the row of the label, 0 in the other. It is 0 too
    where a sequence sends nothing back: a 1 there would be the largest by far, and what a prompt's responses send back to it is
    scaled by the largest.
    """
    largest = coefficients.largest(label)
    scales = power_of_two_scales(largest)
    inverse = scales.new_zeros(2, len(scales))
    inverse[label] = torch.where(largest > 0, 1.0 / scales, 0.0)
    return scales, inverse


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


@dataclasses.dataclass(frozen=True)
class SequenceTable:
    """What one pass knows about every sequence of a batch; NaN where a pass has not been yet. All [N], fp64, CPU.

    Attributes:
        sequence_logprobs: S_i, nats.
        entropy: c_i; where coefficients differ from token to token, the mean of c_t (without e_t).
        update: a_i; likewise the mean of a_t.
        ratios: None where the rollouts have no ``old_logprobs``.
    """

    sequence_logprobs: Tensor
    entropy: Tensor
    update: Tensor
    ratios: RatioTable | None = None

    @classmethod
    def of(cls, rollouts: Rollouts) -> SequenceTable:
        """A table of all sequences, all unknown."""
        n = rollouts.n_sequences
        S, entropy, update = (torch.full((n,), torch.nan, dtype=torch.float64) for _ in range(3))
        return cls(S, entropy, update, None if rollouts.old_logprobs is None else RatioTable.empty(n))

    def put(self, rows: Tensor, sequence_logprobs: Tensor, coefficients: Coefficients) -> None:
        """Write the values of the given rows."""
        self.sequence_logprobs[rows] = sequence_logprobs.detach().to(device="cpu", dtype=torch.float64)
        self.entropy[rows] = coefficients.entropy.cpu()
        self.update[rows] = coefficients.update.cpu()
        if self.ratios is not None and coefficients.ratios is not None:
            for kept, found in zip(vars(self.ratios).values(), vars(coefficients.ratios).values(), strict=True):
                kept[rows] = found


def check_group_sizes(rollouts: Rollouts) -> None:
    """Raise unless every prompt has the two responses the leave-one-out baseline needs.

    Raises:
        RolloutsError: a group has a single sequence; the message names it.
    """
    sizes = torch.bincount(rollouts.prompt_index, minlength=rollouts.n_prompts)
    alone = (sizes < 2).nonzero()
    if alone.numel():
        group = rollouts.group_order[int(alone[0])]
        raise RolloutsError(
            f"Rollouts: group {group} has 1 response with tokens ({alone.numel()} such groups); the leave-one-out baseline "
            "needs at least 2 responses per prompt.",
            fix="sample more responses per prompt, or drop the prompt (empty responses are left out before this check).",
        )


def length_weights(rollouts: Rollouts, weighting: Weighting) -> Tensor:
    """w_i of every sequence, [N] fp64: 1/L_max (``dr_grpo``), 1/L_i (``per_token``) or 1 (``sequence``)."""
    lengths = rollouts.response_lengths.to(torch.float64)
    if weighting == "dr_grpo":
        return 1.0 / rollouts.length_budgets.to(torch.float64)[rollouts.prompt_index]
    return 1.0 / lengths if weighting == "per_token" else torch.ones_like(lengths)


def sequence_coefficients(sequence_logprobs: Tensor, rows: Tensor, rollouts: Rollouts, weights: Tensor) -> Coefficients:
    """c_i and a_i of the given rows, which must be all the rows of their prompts.

    Args:
        sequence_logprobs: [n] S_i, nats; detached here.
        rows: [n] their row indices.
        rollouts: where advantages and groups are.
        weights: [N] from `length_weights`.
    """
    assert rollouts.advantages is not None
    device = sequence_logprobs.device
    prompt = rollouts.prompt_index[rows]
    # Prompts renumbered 0..k-1 within these rows, so that one matrix product forms all group sums, deterministically.
    _, local = torch.unique(prompt, return_inverse=True)
    member = torch.nn.functional.one_hot(local).to(device=device, dtype=torch.float64)
    size = (member.sum(0) @ member.T).reshape(-1)
    weight = weights[rows].to(device)
    weighted = weight * sequence_logprobs.detach().to(torch.float64)
    others = (member @ (member.T @ weighted) - weighted) / (size - 1)
    advantages = rollouts.advantages[rows.to(rollouts.advantages.device)].to(device=device, dtype=torch.float64)
    return Coefficients(entropy=-(weighted - others) / size, update=advantages * weight / size)
