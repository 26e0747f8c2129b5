"""What goes back into the hidden states of a microbatch, and what the signals of that backward are multiplied by.

Legend: S_i sequence log-prob, s_t log-prob and H_t entropy of a token, h_t the hidden state that predicts it, c and a
coefficients.

Where the tokens of a sequence share one coefficient, a single backward of Σ_i S_i serves both X and g: signals are
multiplied by c_i and a_i where they arrive. Where they do not, X and g each take a backward of their own, of Σ_t (c_t s_t +
e_t H_t) and of Σ_t a_t s_t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from entropy_fast.columns.coefficients import Coefficients, labels_of, scales_of

__all__ = ["Cotangent", "TokenWeights", "of_units", "token_weights"]


@dataclasses.dataclass(frozen=True)
class Cotangent:
    """One backward through a microbatch of n sequences with M scored tokens.

    Attributes:
        gradients: [M, H] what goes back into h_t. weights: [2, n] what the signals of every sequence are multiplied by for
        X and for g, fp64; 0 where they are not for it. label: 0 or 1 where this backward is for X or for g alone; None
        where it is for both.
    """

    gradients: Tensor
    weights: Tensor
    label: int | None


@dataclasses.dataclass(frozen=True)
class TokenWeights:
    """Coefficients of one label, scaled sequence by sequence so that what goes back is of ordinary size.

    Attributes:
        label: 0 for X, 1 for g.
        of_logprob: [M] of s_t.
        of_entropy: [M] of H_t, or None.
        inverse: [2, n] 1 over the scales in the row of the label, 0 in the other; fp64.
    """

    label: int
    of_logprob: Tensor
    of_entropy: Tensor | None
    inverse: Tensor


def token_weights(coefficients: Coefficients, labels: str) -> Iterator[TokenWeights]:
    """One a wanted label. Coefficients have to be by token."""
    tokens = coefficients.tokens
    assert tokens is not None
    for label in labels_of(labels):
        scales, inverse = scales_of(coefficients, label)
        by_token = scales[tokens.sequence]
        of_logprob, of_entropy = tokens.of(label)
        yield TokenWeights(label, of_logprob * by_token, None if of_entropy is None else of_entropy * by_token, inverse)


def of_units(
    coefficients: Coefficients, labels: str, unit_logprob: Tensor, unit_entropy: Tensor | None
) -> Iterator[Cotangent]:
    """The backwards of a microbatch, from ∂s_t/∂h_t and ∂H_t/∂h_t [M, H]; one at a time, so that none is held for later.

    Args:
        coefficients: of the sequences.
        labels: which of X and Y is wanted.
        unit_logprob: ∂s_t/∂h_t.
        unit_entropy: ∂H_t/∂h_t; None where X has no such part.
    """
    if coefficients.tokens is None:
        yield Cotangent(unit_logprob, coefficients.rows(labels), None)
        return
    for found in token_weights(coefficients, labels):
        yield Cotangent(_weighted(found, unit_logprob, unit_entropy), found.inverse, found.label)


def _weighted(weights: TokenWeights, unit_logprob: Tensor, unit_entropy: Tensor | None) -> Tensor:
    gradients = unit_logprob * weights.of_logprob.to(unit_logprob.dtype).unsqueeze(1)
    if weights.of_entropy is not None:
        assert unit_entropy is not None
        gradients.addcmul_(unit_entropy, weights.of_entropy.to(unit_entropy.dtype).unsqueeze(1))
    return gradients
