"""The policy-gradient update as a column: advantages, with PPO's importance ratios where they are asked for.

Legend: A_i advantage, w_i length weight, G responses of the prompt, π_old the policy that sampled, r_t = πθ/π_old of token t,
ε clip range.

    a_i = A_i w_i / G
    a_t = A_i w_i r_t / G, and 0 where r_t > 1 + ε_high with A_i > 0, or r_t < 1 - ε_low with A_i < 0

The second is the gradient of Σ_t min(r_t A_i, clip(r_t, 1 - ε_low, 1 + ε_high) A_i) w_i / G.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import ScoredTokens, Side, log_ratios_of
from entropy_fast.columns.lengths import length_weights
from entropy_fast.config import ImportanceRatio, Weighting
from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["PolicyGradient"]

LARGEST_LOG_RATIO = 20.0  # nats; what is above it is no policy that sampled this token


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """Advantages times length weights, and ratios.

    Args:
        weighting: which w_i.
        importance_ratio: ``token`` for r_t, ``none`` for 1.
        clip_range: ε_low and ε_high, None for none.
    """

    weighting: Weighting
    importance_ratio: ImportanceRatio
    clip_range: tuple[float, float] | None
    name: ClassVar[str] = "update"
    side: ClassVar[Side] = Side.UPDATE
    needs_entropies: ClassVar[bool] = False

    @property
    def by_token(self) -> bool:
        """Whether there are ratios."""
        return self.importance_ratio == "token"

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`.

        Raises:
            RolloutsError: importance ratios are asked for, and ``old_logprobs`` are missing.
        """
        if self.by_token and rollouts.old_logprobs is None:
            raise RolloutsError(
                "importance_ratio='token' needs the update batch's `old_logprobs`, and these rollouts have none.",
                fix="pass old_logprobs [N, T], the sampler's log-probs at temperature 1 (in a file: `old_logprobs` in every "
                "row), or importance_ratio='none'.",
            )

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`.

        Raises:
            RolloutsError: ``old_logprobs`` are missing, or cannot be meant.
        """
        self.check(scored.rollouts)
        plain, device = self._plain(scored), scored.logprobs.device
        if not self.by_token:
            return ColumnWeights(plain.to(scored.sequence_logprobs.device))
        log_ratios, places = log_ratios_of(scored), scored.places
        assert log_ratios is not None
        _refuse_ratios(scored, log_ratios)
        by_token = plain[places.sequence]
        nothing = self.clipped(scored, log_ratios) | (by_token == 0)
        weights = torch.where(nothing, 0.0, by_token * log_ratios.clamp_max(LARGEST_LOG_RATIO).exp())
        return ColumnWeights(places.means(weights).to(device), weights.to(device))

    def clipped(self, scored: ScoredTokens, log_ratios: Tensor) -> Tensor:
        """See `Column.clipped`."""
        if self.clip_range is None:
            return torch.zeros_like(log_ratios, dtype=torch.bool)
        (low, high), ratio = self.clip_range, log_ratios.exp()
        sign = self._plain(scored)[scored.places.sequence]
        return ((ratio > 1 + high) & (sign > 0)) | ((ratio < 1 - low) & (sign < 0))

    def _plain(self, scored: ScoredTokens) -> Tensor:
        """[n] a_i without ratios, fp64 on the CPU."""
        assert scored.rollouts.advantages is not None
        advantages = scored.rollouts.advantages.to(device="cpu", dtype=torch.float64)[scored.rows]
        return advantages * length_weights(scored.rollouts, self.weighting)[scored.rows] / scored.places.group_size


def _refuse_ratios(scored: ScoredTokens, log_ratios: Tensor) -> None:
    worst = int(log_ratios.argmax())
    if float(log_ratios[worst]) > LARGEST_LOG_RATIO:
        rollouts, places = scored.rollouts, scored.places
        row, now = int(scored.rows[places.sequence[worst]]), float(scored.logprobs.detach()[worst])
        group = rollouts.group_order[int(rollouts.prompt_index[row])]
        raise RolloutsError(
            f"Rollouts: `old_logprobs` is {now - float(log_ratios[worst]):.6g} at response token {int(places.column[worst])} "
            f"of a response to group {group} (row {row}, empty responses not counted), where the model's log-prob is "
            f"{now:.6g}: a ratio of e^{float(log_ratios[worst]):.3g}.",
            fix="pass the log-prob that the sampler gave to this very token, in its own column; no placeholder such as -9999.",
        )
