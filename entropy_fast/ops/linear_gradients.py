"""Gradients of linear_token_logprobs: by scaling unit gradients, and by going through the vocabulary again.

Legend: h hidden state, W output layer, z logits, s_v the softcap's derivative at z_v (1 without softcap), y the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast import reference
from entropy_fast.ops.blockwise import WORKSPACE_BYTES, add_product, block_logits
from entropy_fast.ops.registration import accumulator
from entropy_fast.ops.token_logprobs import overwrite_with_gradient
from entropy_fast.reference import LinearTokenLogprobs

__all__ = ["Upstream", "gradient_of_hidden", "gradient_of_weight", "second_derivatives"]

# Of logprob, lse and entropy, each [rows]; the last is None when there is no entropy.
Upstream = tuple[Tensor, Tensor, Tensor | None]


def gradient_of_hidden(
    grads: Upstream,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    result: LinearTokenLogprobs,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """``[rows, H]``: the unit gradients, scaled by what comes from above.

    ∂lse/∂h = Σ_v p_v s_v W_v = s_y W_y - ∂logprob/∂h.
    """
    of_logprob, of_lse, of_entropy = grads
    assert result.unit_logprob is not None
    dtype = result.unit_logprob.dtype
    total = result.unit_logprob * (of_logprob.double() - of_lse).to(dtype).unsqueeze(1)
    if of_entropy is not None and result.unit_entropy is not None:
        total.addcmul_(result.unit_entropy, of_entropy.to(dtype).unsqueeze(1))
    needed = (targets != ignore_index) & (of_lse != 0)
    if bool(needed.any()):
        rows = needed.nonzero().squeeze(1)
        at_target = result.logprob[rows].double() + result.lse[rows]
        slope = torch.ones_like(at_target) if softcap is None else 1.0 - (at_target / softcap).square()
        total[rows] += (of_lse[rows] * slope).to(dtype).unsqueeze(1) * weight[targets[rows]].to(dtype)
    return total.to(hidden.dtype)


def gradient_of_weight(
    grads: Upstream,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    normaliser: tuple[Tensor, Tensor | None],
    softcap: float | None,
    wanted: tuple[bool, bool],
    ignore_index: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``weight`` [V, H] and ``bias`` [V]: the logits once more, a few whole rows at a time."""
    lse, entropy = normaliser
    dtype = accumulator(hidden)
    of_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wanted[0] else None
    of_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if wanted[1] else None
    kept = (targets != ignore_index).nonzero().squeeze(1)
    part = weight.to(hidden.dtype)
    for rows in kept.split(_rows_at_once(weight.shape[0], hidden.dtype)):
        h = hidden[rows]
        z = block_logits(h, part, bias, softcap)
        of_logprob, of_lse, of_entropy = (None if t is None else t[rows] for t in grads)
        slope = None if softcap is None else 1.0 - (z / softcap).square()
        own_entropy = None if entropy is None else entropy[rows]
        overwrite_with_gradient(of_logprob, of_lse, of_entropy, z, targets[rows], lse[rows], own_entropy, ignore_index)
        if slope is not None:
            z.mul_(slope)
        if of_weight is not None:
            add_product(of_weight, z.t(), h)
        if of_bias is not None:
            of_bias += z.sum(0, dtype=dtype)
    return (
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


def second_derivatives(
    grads: Sequence[Tensor | None],
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    cotangents: Sequence[Tensor | None],
    softcap: float | None,
    ignore_index: int,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradient of Σ ⟨cotangent, gradient of an input⟩ with respect to the upstream gradients and the inputs.

    By plain torch through the reference, a few whole rows at a time, and so differentiable again.

    Args:
        grads: upstream gradients of logprob, lse and entropy.
        inputs: hidden states, weight, bias.
        targets: ``[rows]``.
        cotangents: of the gradients of hidden states, weight and bias; None where there is none.
        softcap: as in the forward.
        ignore_index: as in the forward.

    Returns:
        For ``grads`` and for ``inputs``, one gradient each, None where the argument is.
    """
    hidden, weight, bias = inputs
    higher = torch.is_grad_enabled()
    of_grads: list[list[Tensor]] = [[] for _ in grads]
    of_hidden = []
    of_parameters: list[Tensor | None] = [None, None]
    for rows in torch.arange(hidden.shape[0], device=hidden.device).split(_rows_at_once(weight.shape[0], hidden.dtype)):
        with torch.enable_grad():
            upstream = [None if grad is None else _leaf(grad[rows], higher) for grad in grads]
            h, w, b = _leaf(hidden[rows], higher), _leaf(weight, higher), None if bias is None else _leaf(bias, higher)
            outputs = reference.linear_token_logprobs(
                h,
                w,
                targets[rows],
                bias=b,
                softcap=softcap,
                want_entropy=grads[2] is not None,
                ignore_index=ignore_index,
            )
            total = sum(
                (g.to(o.dtype) * o).sum()
                for g, o in zip(upstream, outputs[:3], strict=True)
                if g is not None and o is not None
            )
            wanted = [
                (t, None if c is None else c[rows] if t is h else c) for t, c in zip((h, w, b), cotangents, strict=True)
            ]
            pairs = [(t, c) for t, c in wanted if t is not None and c is not None]
            first = torch.autograd.grad(total, [t for t, _ in pairs], create_graph=True)
            projected = sum((f * c).sum() for f, (_, c) in zip(first, pairs, strict=True))
            targets_of_second = [t for t in (*upstream, h, w, b) if t is not None]
            second = iter(
                torch.autograd.grad(
                    projected, targets_of_second, create_graph=higher, allow_unused=True, materialize_grads=True
                )
            )
        for grad, parts in zip(grads, of_grads, strict=True):
            if grad is not None:
                parts.append(next(second))
        of_hidden.append(next(second))
        for index, parameter in enumerate((weight, bias)):
            if parameter is not None:
                part, before = next(second), of_parameters[index]
                of_parameters[index] = part if before is None else before + part
    joined = [
        None if grad is None else torch.cat(parts) if parts else torch.zeros_like(grad)
        for grad, parts in zip(grads, of_grads, strict=True)
    ]
    return joined, [torch.cat(of_hidden) if of_hidden else torch.zeros_like(hidden), *of_parameters]


def _leaf(tensor: Tensor, higher: bool) -> Tensor:
    """Something to differentiate with respect to; with ``higher`` still connected to where it came from."""
    return tensor.view_as(tensor) if higher and tensor.requires_grad else tensor.detach().requires_grad_()


def _rows_at_once(vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of whole logits are worked on at once."""
    return max(16, 4 * WORKSPACE_BYTES // (vocabulary * dtype.itemsize))
