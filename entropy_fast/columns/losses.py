"""From a forward with its graph to the scalars whose gradients are X and g, sequence by sequence.

Legend: L^X_i and L^Y_i losses of sequence i, X_n = Σ_{i in n} ∇L^X_i, g_n = Σ_{i in n} ∇L^Y_i, with coefficients held fixed:

    L^X_i = c_i S_i,    L^Y_i = a_i S_i        where all tokens of a sequence share one, and else
    L^X_i = Σ_t (c_t s_t + e_t H_t),    L^Y_i = Σ_t a_t s_t
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from entropy_fast.columns.coefficients import Coefficients, labels_of, scales_of

__all__ = ["ScoredForward", "padded_backwards", "sequence_losses"]


class ScoredForward(Protocol):
    """A forward of n padded sequences, as `ForwardResult` has it."""

    @property
    def sequence_logprobs(self) -> Tensor:
        """[n] S_i."""

    @property
    def token_logprobs(self) -> Tensor:
        """[n, T] s_t, 0 where nothing is scored."""

    @property
    def scored(self) -> Tensor:
        """[n, T] bool."""

    @property
    def token_entropies(self) -> Tensor | None:
        """[n, T] H_t."""


def sequence_losses(forward: ScoredForward, coefficients: Coefficients, label: int) -> Tensor:
    """[n] L^X_i (``label`` 0) or L^Y_i (1), with their graph, in the dtype of the log-probs."""
    S = forward.sequence_logprobs
    if coefficients.tokens is None:
        return (coefficients.entropy, coefficients.update)[label].to(S.dtype) * S
    of_logprob, of_entropy = coefficients.tokens.of(label)
    losses = _table(forward.scored, of_logprob, S.dtype) * forward.token_logprobs
    if of_entropy is not None:
        assert forward.token_entropies is not None
        losses = losses + _table(forward.scored, of_entropy, S.dtype) * forward.token_entropies
    return losses.sum(-1)


def padded_backwards(
    forward: ScoredForward, coefficients: Coefficients, labels: str
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """The backwards that bring X and g of n sequences: a loss, what its signals are multiplied by, and whether more follow.

    One of Σ_i S_i for both, with c and a [2, n]; or, where coefficients differ within a sequence, one for each of the wanted
    ``labels`` (X, Y) with its weights in the loss, scaled sequence by sequence.
    """
    if coefficients.tokens is None:
        yield forward.sequence_logprobs.sum(), coefficients.rows(labels), False
        return
    for label in labels_of(labels):
        losses = sequence_losses(forward, coefficients, label)
        scales, inverse = scales_of(coefficients, label)
        yield (scales.to(losses.dtype) * losses).sum(), inverse, label == 0 and "Y" in labels


def _table(scored: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(scored.shape, dtype=dtype, device=scored.device).masked_scatter(scored, values.to(dtype))
