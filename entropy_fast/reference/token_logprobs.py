"""Log-probabilities of chosen tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["probabilities", "token_logprobs", "token_logprobs_backward"]


def token_logprobs(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target, and the log of the sum of exponentials of each row.

    Differentiable any number of times, in reverse and in forward mode.

    Args:
        logits: ``[rows, vocabulary]``, any floating dtype.
        targets: ``[rows]`` int64, each in ``[0, vocabulary)`` or equal to ``ignore_index``.
        ignore_index: rows with this target give 0 and pass no gradient, whatever their logits are.

    Returns:
        ``logprob`` ``[rows]`` in float32, or float64 for float64 logits, and ``lse`` ``[rows]`` in float64. A NaN in a
        row makes both of that row NaN. A row that is -inf throughout, or holds a +inf, has a NaN ``logprob``, and -inf
        or +inf as its ``lse``.
    """
    ignored = targets == ignore_index
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored.unsqueeze(-1), 0.0)
    index = targets.masked_fill(ignored, 0).unsqueeze(-1)
    logprob = torch.log_softmax(wide, dim=-1).gather(-1, index).squeeze(-1)
    lse = torch.logsumexp(wide.double(), dim=-1)
    return logprob.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0)


def token_logprobs_backward(
    grad_logprob: Tensor, grad_lse: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Gradient of :func:`token_logprobs` with respect to the logits, given ``lse`` from its forward.

    ``grad_logprob ([v = target] - p_v) + grad_lse p_v`` with ``p_v = exp(logits_v - lse)``. Itself differentiable any
    number of times, with ``logits`` and ``lse`` as independent arguments.

    Args:
        grad_logprob: ``[rows]``, the dtype of ``logprob``.
        grad_lse: ``[rows]`` float64.
        logits: ``[rows, vocabulary]``.
        targets: ``[rows]`` int64.
        lse: ``[rows]`` float64.
        ignore_index: as in the forward; such rows have a gradient of 0.

    Returns:
        ``[rows, vocabulary]`` in the dtype of the logits. Where ``lse`` is not finite, the whole row is NaN.
    """
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0).unsqueeze(-1)
    probability = probabilities(logits, lse, ignored)
    scale = (grad_lse - grad_logprob.double()).to(probability.dtype).unsqueeze(-1)
    gradient = (scale * probability).scatter_add(-1, index, grad_logprob.unsqueeze(-1))
    return gradient.masked_fill(ignored.unsqueeze(-1), 0.0).to(logits.dtype)


def probabilities(logits: Tensor, lse: Tensor, ignored: Tensor) -> Tensor:
    """``exp(logits - lse)`` of each row, with every value of an ``ignored`` row replaced before it is used.

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
    return torch.exp((wide - high.unsqueeze(-1)) - low.unsqueeze(-1))
