"""Log-probabilities of chosen tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_probabilities", "token_logprobs", "token_logprobs_backward"]


def token_logprobs(
    logits: Tensor, targets: Tensor, *, want_entropy: bool = False, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of each row's target, the log of the sum of exponentials of each row, and each row's entropy.

    Differentiable any number of times, in reverse and in forward mode.

    Args:
        logits: ``[rows, vocabulary]``, any floating dtype.
        targets: ``[rows]`` int64, each in ``[0, vocabulary)`` or equal to ``ignore_index``.
        want_entropy: whether the entropy ``-sum_v p_v log p_v`` is computed.
        ignore_index: rows with this target give 0 and pass no gradient, whatever their logits are.

    Returns:
        ``logprob`` ``[rows]`` in float32, or float64 for float64 logits; ``lse`` ``[rows]`` and ``entropy`` ``[rows]``
        (nats; None unless wanted) in float64. A NaN in a row makes all of that row NaN. A row that is -inf throughout, or
        holds a +inf, has a NaN ``logprob`` and ``entropy``, and -inf or +inf as its ``lse``. A single -inf is a token of
        probability 0, which adds 0 to the entropy.
    """
    ignored = targets == ignore_index
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored.unsqueeze(-1), 0.0)
    index = targets.masked_fill(ignored, 0).unsqueeze(-1)
    log_softmax = torch.log_softmax(wide, dim=-1)
    logprob = log_softmax.gather(-1, index).squeeze(-1)
    lse = torch.logsumexp(wide.double(), dim=-1)
    entropy = None
    if want_entropy:
        # Where p is 0, log p is -inf and their product NaN; the gradient of a filled -inf is 0.
        finite = log_softmax.double()
        finite = finite.masked_fill((finite == -torch.inf) & lse.isfinite().unsqueeze(-1), 0.0)
        terms = (log_softmax.double().exp() * finite).sum(-1)
        entropy = -terms.masked_fill(~lse.isfinite(), torch.nan).masked_fill(ignored, 0.0)
    return logprob.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0), entropy


def token_logprobs_backward(
    grad_logprob: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    *,
    grad_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Gradient of :func:`token_logprobs` with respect to the logits, given ``lse`` and ``entropy`` from its forward.

    ``grad_logprob ([v = target] - p_v) + grad_lse p_v - grad_entropy p_v (log p_v + entropy)`` with
    ``log p_v = logits_v - lse``. Itself differentiable any number of times, with ``logits``, ``lse`` and ``entropy`` as
    independent arguments.

    Args:
        grad_logprob: ``[rows]``, the dtype of ``logprob``.
        grad_lse: ``[rows]`` float64.
        logits: ``[rows, vocabulary]``.
        targets: ``[rows]`` int64.
        lse: ``[rows]`` float64.
        grad_entropy: ``[rows]`` float64, or None for no gradient of the entropy.
        entropy: ``[rows]`` float64; needed with ``grad_entropy``.
        ignore_index: as in the forward; such rows have a gradient of 0.

    Returns:
        ``[rows, vocabulary]`` in the dtype of the logits. Where ``lse`` is not finite, the whole row is NaN.
    """
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0).unsqueeze(-1)
    log_probability = log_probabilities(logits, lse, ignored)
    probability = log_probability.exp()
    scale = (grad_lse - grad_logprob.double()).to(probability.dtype).unsqueeze(-1)
    gradient = (scale * probability).scatter_add(-1, index, grad_logprob.unsqueeze(-1))
    if grad_entropy is not None:
        assert entropy is not None
        finite = log_probability.masked_fill(log_probability == -torch.inf, 0.0)
        deviation = finite + entropy.to(probability.dtype).unsqueeze(-1)
        gradient = gradient - grad_entropy.to(probability.dtype).unsqueeze(-1) * probability * deviation
    return gradient.masked_fill(ignored.unsqueeze(-1), 0.0).to(logits.dtype)


def log_probabilities(logits: Tensor, lse: Tensor, ignored: Tensor) -> Tensor:
    """``logits - lse`` of each row, with every value of an ``ignored`` row replaced by 0 before it is used.

    Args:
        logits: ``[rows, vocabulary]``.
        lse: ``[rows]`` float64.
        ignored: ``[rows]`` bool.

    Returns:
        ``[rows, vocabulary]`` in float32, or float64 for float64 logits. Where ``lse`` is not finite, the row is NaN.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored.unsqueeze(-1), 0.0)
    # x - lse in two steps, so that float32 loses nothing of a float64 lse. Where lse is not finite, `low` is NaN.
    high = lse.to(wide.dtype).detach()
    low = (lse - high.double()).to(wide.dtype)
    return (wide - high.unsqueeze(-1)) - low.unsqueeze(-1)
