"""Token log-probs and their derivatives at the end of a forward with tangents.

Legend: h hidden state [H] and h' its tangent, W output layer [V, H] and W' its tangent (b and b' of the bias), z logits, p
softmax(z), y the target, s_v the softcap's derivative at z_v (1 without), u = ∂log p_y/∂h the unit gradient.

    (log p_y)' = u · h' + s_y q_y - Σ_v p_v s_v q_v,   q = W' h + b'

The second part, which a frozen output layer does not have, takes q in blocks of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_fast.engines.tangents.parameters import tangent_of
from entropy_fast.ops import linear_token_logprobs_with_units
from entropy_fast.reference import linear_logits
from entropy_fast.teacher_forcing import OutputLayer

__all__ = ["derivatives_of_hidden", "derivatives_of_logits"]

_BLOCK_BYTES = 2**24  # of one block of logits


def derivatives_of_hidden(
    hidden: Tensor, layer: OutputLayer, targets: Tensor, of_weight: Tensor | None, of_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` [rows] and their derivatives, both [rows], in fp32 or wider.

    Args:
        hidden: [rows, H], with a tangent or without.
        layer: the output layer, without tangents.
        targets: [rows] token ids.
        of_weight: [V, H] tangent of the layer's weight, None where it is frozen.
        of_bias: [V] tangent of its bias, likewise.
    """
    h, tangent = tangent_of(hidden)
    found = linear_token_logprobs_with_units(h, layer.weight, targets, bias=layer.bias, softcap=layer.softcap)
    assert found.unit_logprob is not None
    derivative = torch.zeros_like(found.logprob)
    if tangent is not None:
        derivative = (found.unit_logprob * tangent.to(found.unit_logprob.dtype)).sum(-1)
    if of_weight is not None or of_bias is not None:
        derivative = derivative + _through_layer(h, layer, targets, of_weight, of_bias, found.lse)
    return found.logprob, derivative


def _through_layer(
    h: Tensor, layer: OutputLayer, targets: Tensor, of_weight: Tensor | None, of_bias: Tensor | None, lse: Tensor
) -> Tensor:
    """[rows] s_y q_y - Σ_v p_v s_v q_v."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    at_target, total, weighted = (torch.zeros(len(h), dtype=dtype, device=h.device) for _ in range(3))
    width = max(64, _BLOCK_BYTES // (max(len(h), 1) * dtype.itemsize))
    for begin in range(0, layer.weight.shape[0], width):
        block = slice(begin, begin + width)
        bias = None if layer.bias is None else layer.bias[block]
        z = linear_logits(h, layer.weight[block], bias, layer.softcap).to(dtype)
        q = torch.zeros_like(z)
        if of_weight is not None:
            q += F.linear(h, of_weight[block])
        if of_bias is not None:
            q += of_bias[block].to(dtype)
        if layer.softcap is not None:
            q *= 1.0 - (z / layer.softcap).square()
        # Divided by their own sum: the lse, of logits that may have been rounded otherwise, only keeps them in range.
        weights = (z - lse.to(dtype).unsqueeze(1)).exp()
        total += weights.sum(1)
        weighted += (weights * q).sum(1)
        here = (targets >= begin) & (targets < begin + z.shape[1])
        picked = q.gather(1, (targets - begin).clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
        at_target = torch.where(here, picked, at_target)
    return at_target - weighted / total


def derivatives_of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` [rows] and their derivatives z'_y - Σ_v p_v z'_v, both [rows], in fp32 or wider.

    Args:
        logits: [rows, V], with a tangent or without.
        targets: [rows] token ids.
    """
    z, tangent = tangent_of(logits)
    dtype = torch.promote_types(z.dtype, torch.float32)
    values, derivatives = (torch.zeros(len(z), dtype=dtype, device=z.device) for _ in range(2))
    step = max(16, _BLOCK_BYTES // (z.shape[1] * dtype.itemsize))
    for begin in range(0, len(z), step):
        rows = slice(begin, begin + step)
        chosen = targets[rows].unsqueeze(1)
        logprobs = torch.log_softmax(z[rows].to(dtype), dim=-1)
        values[rows] = logprobs.gather(1, chosen).squeeze(1)
        if tangent is not None:
            along = tangent[rows].to(dtype)
            derivatives[rows] = along.gather(1, chosen).squeeze(1) - (logprobs.exp() * along).sum(1)
    return values, derivatives
