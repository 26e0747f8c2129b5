"""Derivatives of log-probs along the update, sequence by sequence and token by token.

Legend: S_i sequence log-prob, s_it that of token t, c_i entropy coefficient, Ȳ mean preconditioned update gradient of the
update batch, B_E entropy prompts, lr learning rate.

    S'_i = ∇S_i · Ȳ = Σ_t s'_it,      δH₁ = Σ_i lr c_i S'_i / B_E
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

__all__ = ["DirectionalDerivatives"]


@dataclasses.dataclass(frozen=True)
class DirectionalDerivatives:
    """Of the N sequences of the entropy batch, in its order (empty responses left out); all fp64 on the CPU.

    lr times a derivative is the first-order change of a log-prob by the update, in nats.

    Attributes:
        sequences: [N] S'_i, nats per unit of lr.
        tokens: [N, T] s'_it of the token in that column of the rollouts' ``input_ids``, nats per unit of lr; 0 at
            tokens that are not scored.
        weights: [N] lr c_i / B_E: what a sequence's derivative is multiplied by in δH₁.
    """

    sequences: Tensor
    tokens: Tensor
    weights: Tensor

    @property
    def sequence_shares(self) -> Tensor:
        """[N] every sequence's part in δH₁, in the unit of δH₁; they sum to it."""
        return self.weights * self.sequences

    @property
    def token_shares(self) -> Tensor:
        """[N, T] every token's part in δH₁; a sequence's tokens sum to its share."""
        return self.weights.unsqueeze(1) * self.tokens
