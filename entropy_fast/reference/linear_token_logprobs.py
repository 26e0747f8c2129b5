"""Log-probabilities of chosen tokens from hidden states, in plain torch: the whole ``[rows, vocabulary]`` is held."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_fast.reference.token_logprobs import token_logprobs, token_logprobs_backward

__all__ = ["LinearTokenLogprobs", "linear_logits", "linear_token_logprobs"]


class LinearTokenLogprobs(NamedTuple):
    """Results for N rows of H hidden units.

    Attributes:
        logprob: ``[N]`` log-probability of each target, nats; float32, or float64 for float64 hidden states.
        lse: ``[N]`` log of the sum of exponentials of the row's logits; float64.
        entropy: ``[N]`` entropy of the row's distribution, nats; float64; None unless wanted.
        unit_logprob: ``[N, H]`` ∂logprob/∂hidden in the dtype of ``logprob``; None unless wanted.
        unit_entropy: ``[N, H]`` ∂entropy/∂hidden in the dtype of ``logprob``; None unless both were wanted.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None
    unit_logprob: Tensor | None
    unit_entropy: Tensor | None


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """``hidden @ weight.T + bias``, then ``softcap * tanh(· / softcap)``; ``[N, V]``, in the dtype of ``hidden``."""
    logits = torch.nn.functional.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    want_entropy: bool = False,
    unit_gradients: bool = False,
    ignore_index: int = -100,
) -> LinearTokenLogprobs:
    """:func:`token_logprobs` of ``linear_logits(hidden, weight, bias, softcap)``.

    Without ``unit_gradients`` it is differentiable any number of times, in reverse and in forward mode.

    Args:
        hidden: ``[N, H]``, any floating dtype.
        weight: ``[V, H]``.
        targets: ``[N]`` int64, each in ``[0, V)`` or equal to ``ignore_index``.
        bias: ``[V]`` or None.
        softcap: logits are ``softcap * tanh(· / softcap)``; None for none.
        want_entropy: whether entropies are computed.
        unit_gradients: whether ∂logprob/∂hidden, and with ``want_entropy`` ∂entropy/∂hidden, are computed. With
            s_v = 1 - (logit_v / softcap)² (1 without softcap) they are Σ_v ([v = y] - p_v) s_v W_v and
            -Σ_v p_v (log p_v + entropy) s_v W_v. They carry no graph.
        ignore_index: rows with this target give 0 throughout.
    """
    logits = linear_logits(hidden, weight, bias, softcap)
    logprob, lse, entropy = token_logprobs(logits, targets, want_entropy=want_entropy, ignore_index=ignore_index)
    if not unit_gradients:
        return LinearTokenLogprobs(logprob, lse, entropy, None, None)
    logits, weight = logits.detach(), weight.detach()
    slope = None if softcap is None else 1.0 - (logits / softcap).square()
    upstream: list[tuple[Tensor, Tensor | None]] = [(torch.ones_like(logprob), None)]
    if entropy is not None:
        upstream.append((torch.zeros_like(logprob), torch.ones_like(lse)))
    units: list[Tensor | None] = []
    for of_logprob, of_entropy in upstream:
        of_logits = token_logprobs_backward(
            of_logprob.detach(),
            torch.zeros_like(lse),
            logits,
            targets,
            lse.detach(),
            grad_entropy=of_entropy,
            entropy=entropy,
            ignore_index=ignore_index,
        )
        of_logits = of_logits if slope is None else of_logits * slope
        units.append((of_logits @ weight.to(logits.dtype)).to(logprob.dtype))
    return LinearTokenLogprobs(logprob, lse, entropy, units[0], units[1] if len(units) > 1 else None)
