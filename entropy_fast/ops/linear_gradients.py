"""Gradients of linear_token_logprobs: by scaling unit gradients, and by going through the vocabulary again.

Legend: h hidden state, W output layer, z logits, s_v the softcap's derivative at z_v (1 without softcap), y the target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast import reference
from entropy_fast.ops.blockwise import WORKSPACE_BYTES, block_logits
from entropy_fast.ops.registration import accumulator
from entropy_fast.ops.token_logprobs import Backward, overwrite_with_gradient
from entropy_fast.reference import LinearTokenLogprobs

__all__ = [
    "SecondDerivatives",
    "Upstream",
    "gradient_of_hidden",
    "gradient_of_weight",
    "logits_dtype",
    "second_derivatives",
]

# Of logprob, lse and entropy, each [rows]; the last is None when there is no entropy.
Upstream = tuple[Tensor, Tensor, Tensor | None]


def gradient_of_hidden(
    grads: Upstream,
    weight: Tensor,
    targets: Tensor,
    result: LinearTokenLogprobs,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """``[rows, H]``: the unit gradients, scaled by what comes from above, in their dtype.

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
    return total


def logits_dtype(backend: str, hidden: torch.dtype) -> torch.dtype:
    """In which dtype a backend has logits of hidden states of that dtype."""
    wide = backend == "triton" or (backend == "native" and hidden == torch.float16)
    return torch.promote_types(hidden, torch.float32) if wide else hidden


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
    dtype_of_logits: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``weight`` [V, H] and ``bias`` [V]: the logits once more, a few whole rows at a time.

    ``dtype_of_logits`` must be what the forward had them in, or they do not go with its ``lse``.
    """
    lse, entropy = normaliser
    dtype = accumulator(hidden)
    of_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wanted[0] else None
    of_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if wanted[1] else None
    kept = (targets != ignore_index).nonzero().squeeze(1)
    part = weight.to(dtype_of_logits)
    for rows in torch.split(kept, _rows_at_once(weight.shape[0], hidden.dtype)):
        h = hidden[rows].to(dtype_of_logits)
        z = block_logits(h, part, bias, softcap)
        slope = None if softcap is None else 1.0 - (z / softcap).square()
        of_entropy, own_entropy = (None if t is None else t[rows] for t in (grads[2], entropy))
        upstream = (grads[0][rows], grads[1][rows], of_entropy)
        overwrite_with_gradient(Backward(*upstream, z, targets[rows], lse[rows], own_entropy, ignore_index))
        if slope is not None:
            z.mul_(slope)
        if of_weight is not None:
            of_weight += z.t() @ h
        if of_bias is not None:
            of_bias += z.sum(0, dtype=dtype)
    return (
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


@dataclasses.dataclass(frozen=True)
class SecondDerivatives:
    """Of Σ ⟨cotangent, gradient of an input⟩, with respect to upstream gradients and inputs; None where not wanted."""

    of_upstream: list[Tensor | None]
    of_hidden: Tensor | None
    of_weight: Tensor | None
    of_bias: Tensor | None


def second_derivatives(
    upstream: Sequence[Tensor | None],
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
    softcap: float | None,
    ignore_index: int,
) -> SecondDerivatives:
    """By plain torch through the reference, a few whole rows at a time, and so differentiable again.

    Args:
        upstream: gradients of logprob, lse and entropy, ``[rows]`` each.
        inputs: hidden states, weight, bias.
        targets: ``[rows]``.
        cotangents: of the gradients of hidden states, weight and bias; None where there is none.
        wanted: whether the derivative is wanted, for each of ``upstream`` and ``inputs``.
        softcap: as in the forward.
        ignore_index: as in the forward.
    """
    hidden, weight, bias = inputs
    by_row: list[list[Tensor]] = [[] for _ in range(4)]
    totals: list[Tensor | None] = [None, None]
    for rows in torch.split(
        torch.arange(hidden.shape[0], device=hidden.device), _rows_at_once(weight.shape[0], hidden.dtype)
    ):
        part_upstream = [None if t is None else t[rows] for t in upstream]
        part_cotangents = [None if cotangents[0] is None else cotangents[0][rows], *cotangents[1:]]
        found = _of_few_rows(
            [*part_upstream, hidden[rows], weight, bias], targets[rows], part_cotangents, wanted, softcap, ignore_index
        )
        for parts, new in zip(by_row, found[:4], strict=True):
            if new is not None:
                parts.append(new)
        totals = [
            old if new is None else new if old is None else old + new
            for old, new in zip(totals, found[4:], strict=True)
        ]
    *of_upstream, of_hidden = (torch.cat(parts) if parts else None for parts in by_row)
    return SecondDerivatives(of_upstream, of_hidden, *totals)


def _of_few_rows(
    tensors: list[Tensor | None],
    targets: Tensor,
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
    softcap: float | None,
    ignore_index: int,
) -> list[Tensor | None]:
    """One derivative for each of ``tensors``: three upstream gradients, hidden states, weight and bias."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [None if t is None else _leaf(t, higher) for t in tensors]
        upstream, (hidden, weight, bias) = leaves[:3], leaves[3:]
        assert hidden is not None and weight is not None
        outputs = reference.linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            softcap=softcap,
            want_entropy=upstream[2] is not None,
            ignore_index=ignore_index,
        )[:3]
        weighted = [(g, o) for g, o in zip(upstream, outputs, strict=True) if g is not None and o is not None]
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


def _rows_at_once(vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of whole logits are worked on at once."""
    return max(16, 2 * WORKSPACE_BYTES // (vocabulary * dtype.itemsize))
