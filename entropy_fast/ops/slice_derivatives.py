"""Second derivatives of sliced_linear_token_logprobs, and so all further ones: through the op on each slice and collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_fast.ops.registration import accumulator
from entropy_fast.ops.slice_collectives import copied, gathered
from entropy_fast.ops.slice_parts import SliceCall
from entropy_fast.reference import SliceValues, merge_slices

__all__ = ["second_derivatives"]


def second_derivatives(
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
    call: SliceCall,
    impossible: Tensor,
    group: Any,
) -> list[Tensor | None]:
    """Of Σ ⟨cotangent, gradient of an input⟩ over inputs and ranks; differentiable again.

    Args:
        upstream: gradients of logprob, lse and entropy, ``[N]`` each.
        inputs: hidden states, the slice's weight and bias.
        cotangents: of the gradients of ``inputs``; None where there is none.
        wanted: whether the derivative is wanted, for each of ``upstream`` and ``inputs``.
        call: as this slice sees it.
        impossible: ``[N]`` whether none of the slice's tokens can come.
        group: the process group.

    Returns:
        One for each of ``upstream`` and ``inputs``, None where not wanted.
    """
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [None if t is None else _leaf(t, higher) for t in (*upstream, *inputs)]
        hidden, weight, bias = leaves[3:]
        assert hidden is not None and weight is not None
        outputs = _composed(hidden, weight, bias, call, impossible, group)
        weighted = [(g, o) for g, o in zip(leaves[:3], outputs, strict=True) if g is not None and o is not None]
        total = torch.stack([(g.to(o.dtype) * o).sum().double() for g, o in weighted]).sum()
        pairs = [(t, c) for t, c in zip(leaves[3:], cotangents, strict=True) if t is not None and c is not None]
        first = torch.autograd.grad(total, [t for t, _ in pairs], create_graph=True)
        projected = torch.stack([(f * c).sum().double() for f, (_, c) in zip(first, pairs, strict=True)]).sum()
        chosen = [t if want else None for t, want in zip(leaves, wanted, strict=True)]
        second = torch.autograd.grad(
            projected,
            [t for t in chosen if t is not None],
            create_graph=higher,
            allow_unused=True,
            materialize_grads=True,
        )
    remaining = iter(second)
    return [None if t is None else next(remaining) for t in chosen]


def _leaf(tensor: Tensor, higher: bool) -> Tensor:
    """Something to differentiate with respect to; with ``higher`` still connected to where it came from."""
    return tensor.view_as(tensor) if higher and tensor.requires_grad else tensor.detach().requires_grad_()


def _composed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: SliceCall,
    impossible: Tensor,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logprob, lse and entropy with a graph. Every rank's has the same collectives in it, in the same places."""
    hidden = copied(hidden, group)
    own = _own(hidden, weight, bias, call, impossible)
    lses, logits, *entropies = gathered(torch.stack(own), group).unbind(1)
    merged = merge_slices(SliceValues(lses, logits, entropies[0] if entropies else None))
    return call.results(merged, torch.float64)


def _own(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: SliceCall,
    impossible: Tensor,
) -> list[Tensor]:
    """``[N]`` float64 of this slice: lse, target's logit and, where wanted, the entropy."""
    if weight.shape[0] == 0:
        # Of nothing, but with a graph: going back through it this rank has to take part in what the others do.
        nothing = 0.0 * (hidden.double().sum(1) + weight.sum() + (0.0 if bias is None else bias.sum()))
        return [nothing - torch.inf, nothing, nothing][: 2 + call.want_entropy]
    # The derivatives of a row without a possible token are NaN: it is left out, and its target's logit found by itself.
    alive = call.local.masked_fill(impossible, call.IGNORED)
    found = dataclasses.replace(call, units=True).op(hidden, weight, bias, alive)
    row = torch.where(call.held, call.local, 0)
    dtype = accumulator(hidden)
    logit = (hidden.to(dtype) * weight[row].to(dtype)).sum(1)
    if bias is not None:
        logit = logit + bias[row].to(dtype)
    if call.softcap is not None:
        logit = call.softcap * torch.tanh(logit / call.softcap)
    values = [torch.where(impossible, -torch.inf, found.lse), torch.where(call.held, logit.double(), 0.0)]
    return values if found.entropy is None else [*values, found.entropy]
