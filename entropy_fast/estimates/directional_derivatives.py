"""Derivatives of log-probs along the update, sequence by sequence and token by token.

Legend: S_i sequence log-prob, s_it that of token t, H_it the entropy it was drawn with, c_i, c_it and e_it entropy
coefficients, Ȳ mean preconditioned update gradient of the update batch, B_E entropy prompts, lr learning rate.

    S'_i = ∇S_i · Ȳ = Σ_t s'_it,      δH₁ = Σ_i lr c_i S'_i / B_E

and, where coefficients differ within a sequence, δH₁ = Σ_i Σ_t lr (c_it s'_it + e_it H'_it) / B_E.
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
        token_shares: [N, T] every token's part in δH₁, in the unit of δH₁; they sum to it.
        entropies: [N, T] H'_it, nats per unit of lr; None unless the entropy gradient is estimated from token entropies.
    """

    sequences: Tensor
    tokens: Tensor
    token_shares: Tensor
    entropies: Tensor | None = None

    @property
    def sequence_shares(self) -> Tensor:
        """[N] every sequence's part in δH₁: the sum of its tokens' shares."""
        return self.token_shares.sum(1)
