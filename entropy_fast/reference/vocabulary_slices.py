"""Log-probabilities over a vocabulary that is cut into slices, from what every slice says by itself, in plain torch.

Legend: slice r holds some rows W_v of the output layer; within it p^r is the softmax of its own logits z_v, lse_r the log of
the sum of their exponentials, H_r the entropy of p^r. Of the whole vocabulary: p, lse, H. y is the target, and
π_r = exp(lse_r - lse) the probability that a token is one of slice r; for those p = π_r p^r. So

    lse = log Σ_r exp(lse_r)        log p_y = z_y - lse        H = Σ_r π_r (H_r - log π_r)

A slice whose tokens can never come (all its logits are -inf, or it has no rows) has π_r = 0 and adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_fast.reference.linear_token_logprobs import LinearTokenLogprobs, linear_logits
from entropy_fast.reference.token_logprobs import token_logprobs, token_logprobs_backward

__all__ = ["MergedSlices", "SliceValues", "merge_slices", "sliced_linear_token_logprobs"]

_IGNORED = -100


class SliceValues(NamedTuple):
    """What each of R slices says of N rows by itself; ``[R, N]`` float64.

    Attributes:
        lse: log of the sum of exponentials of the slice's logits; -inf where its tokens can never come.
        target_logit: the target's logit from the slice that holds it, 0 from the others.
        entropy: of the slice's own distribution, nats; not looked at where ``lse`` is -inf. None unless wanted.
    """

    lse: Tensor
    target_logit: Tensor
    entropy: Tensor | None


class MergedSlices(NamedTuple):
    """Values of the whole vocabulary, and the slices' parts in them; float64.

    Attributes:
        logprob: ``[N]`` of the target, nats.
        lse: ``[N]``.
        entropy: ``[N]`` nats; None unless the slices have theirs.
        share: ``[R, N]`` π_r.
        log_share: ``[R, N]`` log π_r; -inf where the slice's tokens can never come.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None
    share: Tensor
    log_share: Tensor


def merge_slices(values: SliceValues) -> MergedSlices:
    """Values of the whole vocabulary from those of its slices; differentiable any number of times.

    Where the whole ``lse`` is not finite, everything else is NaN.
    """
    lse = torch.logsumexp(values.lse, 0)
    usable = torch.where(lse.isfinite(), lse, torch.nan)
    log_share = values.lse - usable
    share = log_share.exp()
    entropy = None
    if values.entropy is not None:
        impossible = (values.lse == -torch.inf) & lse.isfinite()
        entropy = (share * torch.where(impossible, 0.0, values.entropy - log_share)).sum(0)
    return MergedSlices(values.target_logit.sum(0) - usable, lse, entropy, share, log_share)


def sliced_linear_token_logprobs(
    hidden: Tensor,
    weights: Sequence[Tensor],
    targets: Tensor,
    *,
    biases: Sequence[Tensor] | None = None,
    softcap: float | None = None,
    want_entropy: bool = False,
    unit_gradients: bool = False,
    ignore_index: int = -100,
) -> LinearTokenLogprobs:
    """`linear_token_logprobs` of the slices put one under the other, by way of each slice's own values.

    Without ``unit_gradients`` it is differentiable any number of times, in reverse and in forward mode.

    Args:
        hidden: ``[N, H]``, any floating dtype.
        weights: ``[V_r, H]`` each, successive rows of the output layer; one may have no rows.
        targets: ``[N]`` int64, each in ``[0, Σ V_r)`` or equal to ``ignore_index``.
        biases: ``[V_r]`` each, or None.
        softcap: as of `linear_token_logprobs`.
        want_entropy: as there.
        unit_gradients: as there.
        ignore_index: as there.
    """
    ignored = targets == ignore_index
    bias_of: Sequence[Tensor | None] = [None] * len(weights) if biases is None else biases
    slices, first = [], 0
    for weight, bias in zip(weights, bias_of, strict=True):
        held = ~ignored & (targets >= first) & (targets < first + weight.shape[0])
        local = torch.where(held, targets - first, 0).masked_fill(ignored, _IGNORED)
        slices.append(_Slice(weight, linear_logits(hidden, weight, bias, softcap), local, held))
        first += weight.shape[0]
    lses, target_logits, entropies = zip(*(part.values(want_entropy) for part in slices), strict=True)
    stacked = torch.stack([part for part in entropies if part is not None]) if want_entropy else None
    merged = merge_slices(SliceValues(torch.stack(lses), torch.stack(target_logits), stacked))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprob, lse, entropy = (
        None if part is None else part.masked_fill(ignored, 0.0)
        for part in (merged.logprob, merged.lse, merged.entropy)
    )
    assert logprob is not None and lse is not None
    logprob = logprob.to(dtype)
    if not unit_gradients:
        return LinearTokenLogprobs(logprob, lse, entropy, None, None)
    one, nothing = torch.ones_like(logprob).detach(), torch.zeros_like(logprob).detach()
    upstream: list[tuple[Tensor, Tensor | None]] = [(one, None)]
    if entropy is not None:
        upstream.append((nothing, one.double()))
    normaliser = (lse.detach(), None if entropy is None else entropy.detach())
    units = [
        torch.stack([part.gradient_of_hidden(*grads, *normaliser, softcap).to(dtype) for part in slices]).sum(0)
        for grads in upstream
    ]
    return LinearTokenLogprobs(logprob, lse, entropy, units[0], units[1] if len(units) > 1 else None)


class _Slice(NamedTuple):
    """One slice: weight [V_r, H], logits [N, V_r], target within it [N] (0 where it is elsewhere), whether it is here [N]."""

    weight: Tensor
    logits: Tensor
    local: Tensor
    held: Tensor

    def values(self, want_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """``[N]`` lse, logit of the target, entropy; float64."""
        logits = self.logits.double()
        if logits.shape[1] == 0:
            nothing = logits.sum(1)
            return nothing - torch.inf, nothing, nothing if want_entropy else None
        # Rows without a possible token are put aside before the softmax: its derivative there is NaN, and so is 0 times it.
        impossible = (logits == -torch.inf).all(1)
        put_aside = self.logits.masked_fill(impossible.unsqueeze(1), 0.0)
        _, lse, entropy = token_logprobs(put_aside, self.local, want_entropy=want_entropy, ignore_index=_IGNORED)
        of_target = logits.gather(1, self.local.clamp_min(0).unsqueeze(1)).squeeze(1)
        return torch.where(impossible, -torch.inf, lse), torch.where(self.held, of_target, 0.0), entropy

    def gradient_of_hidden(
        self, of_logprob: Tensor, of_entropy: Tensor | None, lse: Tensor, entropy: Tensor | None, softcap: float | None
    ) -> Tensor:
        """``[N, H]``: what comes back through this slice's logits, given the whole vocabulary's lse and entropy."""
        logits = self.logits.detach()
        if logits.shape[1] == 0:
            return logits @ self.weight.detach().to(logits.dtype)
        of_logits = token_logprobs_backward(
            # Where another slice holds the target, its log-prob depends on these logits by -lse alone.
            torch.where(self.held, of_logprob, 0.0),
            torch.where(self.held, 0.0, -of_logprob).double(),
            logits,
            self.local,
            lse,
            grad_entropy=of_entropy,
            entropy=entropy,
            ignore_index=_IGNORED,
        )
        of_logits = of_logits if softcap is None else of_logits * (1.0 - (logits / softcap).square())
        return of_logits @ self.weight.detach().to(logits.dtype)
