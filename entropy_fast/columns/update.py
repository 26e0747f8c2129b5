"""The policy-gradient update as a column, in closed form: advantages, PPO's ratios, a KL term, an entropy bonus.

Legend: A_i advantage, ω_t the token's weight (1 unless the rollouts have some), w_i length weight, G responses of the prompt,
π_old the policy that sampled, r_t = πθ/π_old of token t or, by sequence, the geometric mean over the response; ε clip range,
c dual clip, β coefficient of KL_t = KL(πθ, π_ref) as estimated at token t, b entropy bonus, d_t = log πθ - log π_ref.

    a_t = w_i (A_i ω_t r_t [not clipped] - β KL'_t) / G,      e_t = b w_i / G

(with a ratio by sequence the first part is its mean over the response's tokens), where

    clipped:  r_t > 1 + ε_high with A_i ω_t > 0, or r_t < 1 - ε_low with A_i ω_t < 0, or r_t > c with A_i ω_t < 0
    KL'_t:    1 (k1),  d_t (k2),  1 - exp(-d_t) (k3)

That is minus the gradient, by s_t and by H_t, of the loss

    Σ_t w_i (-min(r_t A, clip(r_t, 1 - ε_low, 1 + ε_high) A) + β KL_t - b H_t) / G,      A = A_i ω_t

with its first term held at c A from below under negative advantages. Without ratios r_t is 1 and nothing is clipped.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import ColumnWeights
from entropy_fast.columns.column import ColumnDefaults, ScoredTokens, Side, log_ratios_of
from entropy_fast.columns.lengths import length_weights
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["PolicyGradient"]

LARGEST_LOG_RATIO = 20.0  # nats; what is above it is no policy that sampled this token


@dataclasses.dataclass(frozen=True)
class PolicyGradient(ColumnDefaults):
    """The update that the options describe.

    Args:
        options: of the estimate.
        token_weights: whether the rollouts have weights by token.
        name: what results call it.
    """

    options: EstimateOptions
    token_weights: bool = False
    name: str = "update"
    side: ClassVar[Side] = Side.UPDATE

    @property
    def needs_entropies(self) -> bool:
        """Whether there is a bonus."""
        return self.options.entropy_bonus != 0

    @property
    def by_token(self) -> bool:
        """Whether anything differs within a response."""
        options = self.options
        return (
            self.token_weights
            or options.importance_ratio == "token"
            or options.kl_coefficient != 0
            or options.entropy_bonus != 0
        )

    def check(self, rollouts: Rollouts) -> None:
        """See `Column.check`.

        Raises:
            RolloutsError: importance ratios or a KL term are asked for, and ``old_logprobs`` or ``ref_logprobs`` are missing.
        """
        options = self.options
        for wanted, asked, field, whose, without in (
            (
                options.importance_ratio != "none",
                f"importance_ratio={options.importance_ratio!r}",
                "old_logprobs",
                "the sampler's",
                "importance_ratio='none'",
            ),
            (options.kl_coefficient != 0, "a KL term", "ref_logprobs", "the reference policy's", "kl_coefficient=0"),
        ):
            if wanted and getattr(rollouts, field) is None:
                raise RolloutsError(
                    f"{asked} needs the update batch's `{field}`, and these rollouts have none.",
                    fix=f"pass {field} [N, T], {whose} log-probs at the policy's temperature, 1 as a rule (in a file: "
                    f"`{field}` in every row), or {without}.",
                )

    def weigh(self, scored: ScoredTokens) -> ColumnWeights:
        """See `Column.weigh`.

        Raises:
            RolloutsError: ``old_logprobs`` or ``ref_logprobs`` are missing, or cannot be meant.
        """
        self.check(scored.rollouts)
        device, places = scored.logprobs.device, scored.places
        lengths = length_weights(scored.rollouts, self.options.of_update)[scored.rows] / places.group_size
        plain = self._advantages(scored) * lengths
        log_ratios = self._log_ratios(scored)
        # The rollouts know of weights by token, also where whoever made the column did not.
        if not self.by_token and scored.rollouts.token_weights is None:
            if log_ratios is None:
                return ColumnWeights(plain.to(scored.sequence_logprobs.device))
            kept = torch.where(places.means(self.clipped(scored, log_ratios).double()) > 0, 0.0, plain)
            ratios = places.means(log_ratios).clamp_max(LARGEST_LOG_RATIO).exp()
            return ColumnWeights(torch.where(kept == 0, 0.0, kept * ratios).to(scored.sequence_logprobs.device))
        a = plain[places.sequence] * self._weights_of_tokens(scored)
        if log_ratios is not None:
            nothing = self.clipped(scored, log_ratios) | (a == 0)
            a = torch.where(nothing, 0.0, a * log_ratios.clamp_max(LARGEST_LOG_RATIO).exp())
        if self.options.importance_ratio == "sequence":
            # A response's ratio is every token's: what any token weighs comes back to all of them.
            a = places.means(a)[places.sequence]
        lengths = lengths[places.sequence]
        if self.options.kl_coefficient != 0:
            a = a - self.options.kl_coefficient * lengths * self._of_kl(scored)
        e = self.options.entropy_bonus * lengths if self.options.entropy_bonus != 0 else None
        return ColumnWeights(places.means(a).to(device), a.to(device), None if e is None else e.to(device))

    def clipped(self, scored: ScoredTokens, log_ratios: Tensor) -> Tensor:
        """See `Column.clipped`; with one ratio a response, ``log_ratios`` may be by token all the same."""
        options = self.options
        nothing = torch.zeros_like(log_ratios, dtype=torch.bool)
        if options.importance_ratio == "none":
            return nothing
        if options.importance_ratio == "sequence":
            log_ratios = scored.places.means(log_ratios)[scored.places.sequence]
        ratio, sign = (
            log_ratios.exp(),
            self._advantages(scored)[scored.places.sequence] * self._weights_of_tokens(scored),
        )
        if options.clip_range is not None:
            low, high = options.clip_range
            nothing = ((ratio > 1 + high) & (sign > 0)) | ((ratio < 1 - low) & (sign < 0))
        if options.dual_clip is not None:
            nothing = nothing | ((ratio > options.dual_clip) & (sign < 0))
        return nothing

    def _log_ratios(self, scored: ScoredTokens) -> Tensor | None:
        """[M] log r_t, fp64 on the CPU; None without ratios."""
        if self.options.importance_ratio == "none":
            return None
        log_ratios, places = log_ratios_of(scored), scored.places
        assert log_ratios is not None
        _refuse_far(scored, log_ratios, "old_logprobs", "the log-prob that the sampler gave")
        if self.options.importance_ratio == "sequence":
            return places.means(log_ratios)[places.sequence]
        return log_ratios

    def _of_kl(self, scored: ScoredTokens) -> Tensor:
        """[M] the derivative of KL_t by s_t, fp64 on the CPU."""
        reference = scored.rollouts.of_response_tokens("ref_logprobs", scored.rows)
        assert reference is not None
        d = scored.logprobs.detach().to(device="cpu", dtype=torch.float64) - reference
        if self.options.kl_estimator == "k1":
            return torch.ones_like(d)
        if self.options.kl_estimator == "k2":
            return d
        _refuse_far(scored, -d, "ref_logprobs", "the log-prob that the reference policy gives")
        return -torch.expm1(-d)

    @staticmethod
    def _advantages(scored: ScoredTokens) -> Tensor:
        """[n] A_i, fp64 on the CPU."""
        assert scored.rollouts.advantages is not None
        return scored.rollouts.advantages.to(device="cpu", dtype=torch.float64)[scored.rows]

    @staticmethod
    def _weights_of_tokens(scored: ScoredTokens) -> Tensor | float:
        """[M] ω_t, fp64 on the CPU; 1 where there are none."""
        weights = scored.rollouts.of_response_tokens("token_weights", scored.rows)
        return 1.0 if weights is None else weights


def _refuse_far(scored: ScoredTokens, log_ratios: Tensor, field: str, whose: str) -> None:
    """Raise where a policy gives a token a probability that no policy like the other one can.

    ``log_ratios`` [M] are of the model over the field, or the other way round.
    """
    worst = int(log_ratios.argmax())
    if float(log_ratios[worst]) > LARGEST_LOG_RATIO:
        rollouts, places = scored.rollouts, scored.places
        row, now = int(scored.rows[places.sequence[worst]]), float(scored.logprobs.detach()[worst])
        values = rollouts.of_response_tokens(field, scored.rows)
        assert values is not None
        group = rollouts.group_order[int(rollouts.prompt_index[row])]
        raise RolloutsError(
            f"Rollouts: `{field}` is {float(values[worst]):.6g} at response token {int(places.column[worst])} "
            f"of a response to group {group} (row {row}, empty responses not counted), where the model's log-prob is "
            f"{now:.6g}: a ratio of e^{float(log_ratios[worst]):.3g}.",
            fix=f"pass {whose} to this very token, in its own column; no placeholder such as -9999.",
        )
