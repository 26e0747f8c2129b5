"""One slice's part in the log-probs of a whole vocabulary: pure functions, which know nothing of other processes.

Legend as in `entropy_fast.reference.vocabulary_slices`: lse_r, H_r and p^r of slice r by itself, π_r its share, y the target.
Backwards each slice works with its own unit gradients and what comes back to its own values,

    ∂lse/∂lse_r = π_r        ∂H/∂H_r = π_r        ∂H/∂lse_r = π_r (H_r - log π_r - H)

and log p_y = log p^r_y + log π_r in the slice that holds y.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from entropy_fast.ops.backends import AUTO
from entropy_fast.ops.linear_gradients import Upstream, gradient_of_hidden
from entropy_fast.ops.registration import accumulator
from entropy_fast.reference import LinearTokenLogprobs, MergedSlices, SliceValues

__all__ = ["SliceCall", "gradient_of_rows", "hidden_part", "own_values", "slice_gradients", "values_of"]


@dataclasses.dataclass(frozen=True)
class SliceCall:
    """A call as one slice sees it, apart from the tensors that may be differentiated.

    Attributes:
        local: ``[N]`` index of the target among the slice's rows; 0 where it is elsewhere, -100 where the row is ignored.
        held: ``[N]`` whether the slice holds the target.
        ignored: ``[N]`` whether the row is ignored.
        outside: ``[N]`` whether no slice holds the target.
        softcap: of the logits, or None.
        want_entropy: whether entropies are computed.
        units: whether unit gradients are.
        backend: of the op on the slice: a name, or "auto".
    """

    IGNORED: ClassVar[int] = -100

    local: Tensor
    held: Tensor
    ignored: Tensor
    outside: Tensor
    softcap: float | None
    want_entropy: bool
    units: bool
    backend: str

    @classmethod
    def of(
        cls,
        targets: Tensor,
        rows: range,
        vocabulary: int,
        *,
        softcap: float | None = None,
        want_entropy: bool = False,
        units: bool = False,
        ignore_index: int = IGNORED,
        backend: str = AUTO,
    ) -> SliceCall:
        """With ``targets`` ``[N]`` in the whole vocabulary, of which the slice has ``rows``."""
        ignored = targets == ignore_index
        held = ~ignored & (targets >= rows.start) & (targets < rows.stop)
        local = torch.where(held, targets - rows.start, 0).masked_fill(ignored, cls.IGNORED)
        outside = ~ignored & ((targets < 0) | (targets >= vocabulary))
        return cls(local, held, ignored, outside, softcap, want_entropy, units, backend)

    def op(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor) -> LinearTokenLogprobs:
        """`linear_token_logprobs` on the slice alone, with these targets; has a graph where gradients are recorded."""
        return LinearTokenLogprobs(
            *torch.ops.entropy_fast.linear_token_logprobs(
                hidden, weight, local, bias, self.softcap, self.want_entropy, self.units, self.IGNORED, self.backend
            )
        )

    def results(self, merged: MergedSlices, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-prob in ``dtype``, lse and entropy in float64; 0 in rows that are ignored."""
        logprob, lse = (part.masked_fill(self.ignored, 0.0) for part in (merged.logprob, merged.lse))
        entropy = None if merged.entropy is None else merged.entropy.masked_fill(self.ignored, 0.0)
        return logprob.to(dtype), lse, entropy


def own_values(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: SliceCall) -> LinearTokenLogprobs:
    """The op on the slice alone; unit gradients are 0 where the slice's tokens can never come (lse = -inf)."""
    if weight.shape[0]:
        found = call.op(hidden, weight, bias, call.local)
    else:
        nothing = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        unit = torch.zeros(hidden.shape, dtype=accumulator(hidden), device=hidden.device)
        found = LinearTokenLogprobs(
            nothing.to(unit.dtype),
            nothing.masked_fill(~call.ignored, -torch.inf),
            nothing if call.want_entropy else None,
            unit if call.units else None,
            unit if call.units and call.want_entropy else None,
        )
    impossible = (found.lse == -torch.inf).unsqueeze(1)
    return LinearTokenLogprobs(
        *found[:3], *(None if unit is None else unit.masked_fill(impossible, 0.0) for unit in found[3:])
    )


def values_of(found: LinearTokenLogprobs, call: SliceCall) -> Tensor:
    """``[2, N]`` or, with entropies, ``[3, N]`` float64: what the other slices have to know, a row of `SliceValues` each."""
    # Log-probs are narrower than lse, but rounded relative to what they are: so is what the whole makes of them.
    logit = torch.where(found.lse == -torch.inf, -torch.inf, found.logprob.double() + found.lse)
    target_logit = torch.where(call.held, logit, 0.0).masked_fill(call.outside, torch.nan)
    return torch.stack([part for part in (found.lse, target_logit, found.entropy) if part is not None])


def slice_gradients(grads: Upstream, values: SliceValues, merged: MergedSlices, held: Tensor) -> Upstream:
    """What comes back to each slice's own log-prob of its target, lse and entropy.

    Args:
        grads: upstream gradients of logprob, lse and entropy of the whole vocabulary, ``[N]`` each; None for no entropy.
        values: of the slices.
        merged: of all of them together.
        held: ``[R, N]`` bool, whether the slice holds the row's target.

    Returns:
        Three times ``[R, N]`` float64, the last None where that of ``grads`` is. NaN where the row has no log-prob.
    """
    of_logprob, of_lse, of_entropy = grads
    of_logprob = torch.where(merged.logprob.isnan(), torch.nan, of_logprob.double())
    # 1 - π_r as a sum: it may be far below the rounding of a number near 1.
    others = _sums_of_others(merged.share)
    to_lse = of_logprob * torch.where(held, others, -merged.share) + of_lse.double() * merged.share
    to_entropy = None
    if of_entropy is not None:
        assert values.entropy is not None and merged.entropy is not None
        deviation = torch.where(merged.share == 0, 0.0, values.entropy - merged.log_share - merged.entropy)
        to_entropy = of_entropy.double() * merged.share
        to_lse = to_lse + to_entropy * deviation
    return of_logprob * held, to_lse, to_entropy


def hidden_part(own: Upstream, weight: Tensor, found: LinearTokenLogprobs, call: SliceCall) -> Tensor:
    """``[N, H]`` this slice's part in the gradient of the hidden states, in the dtype of the unit gradients.

    Args:
        own: what comes back to this slice's values, ``[N]`` each: its row of `slice_gradients`.
        weight: ``[V_r, H]``.
        found: by `own_values`, with unit gradients.
        call: as this slice sees it.
    """
    assert found.unit_logprob is not None
    if weight.shape[0] == 0:
        return torch.zeros_like(found.unit_logprob)
    return gradient_of_hidden(own, weight, call.local, found, call.softcap, call.IGNORED)


def gradient_of_rows(
    grads: Upstream,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    merged: MergedSlices,
    call: SliceCall,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the slice's weight ``[V_r, H]`` and bias ``[V_r]``; one that is not wanted may be None.

    Args:
        grads: upstream gradients of the whole vocabulary's logprob, lse and entropy, ``[N]`` each.
        inputs: hidden states, weight and bias.
        merged: of all slices.
        call: as this slice sees it.
        wanted: whether weight and bias want one.
    """
    hidden, weight, bias = inputs
    if weight.shape[0] == 0:
        return torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    of_logprob, of_lse, of_entropy = grads
    dtype = accumulator(hidden)
    # These logits are softmaxed over the whole vocabulary; where another slice has the target, by -lse alone.
    _, of_weight, of_bias = torch.ops.entropy_fast.linear_token_logprobs_backward(
        torch.where(call.held, of_logprob, 0.0).to(dtype),
        torch.where(call.held, of_lse.double(), of_lse.double() - of_logprob.double()),
        None if of_entropy is None else of_entropy.double(),
        hidden,
        weight,
        bias,
        call.local,
        merged.logprob.to(dtype),
        torch.where(merged.logprob.isnan(), torch.nan, merged.lse),
        merged.entropy,
        None,
        None,
        call.softcap,
        [False, *wanted],
        call.IGNORED,
        call.backend,
    )
    return of_weight, of_bias


def _sums_of_others(parts: Tensor) -> Tensor:
    """``[R, N]``: for each row the sum of all the others, which are not negative, without a difference."""
    nothing = torch.zeros_like(parts[:1])
    before = torch.cat([nothing, parts[:-1].cumsum(0)])
    after = torch.cat([parts[1:].flip(0).cumsum(0).flip(0), nothing])
    return before + after
