"""Token log-probs and entropies, and their derivatives, at the end of a forward with tangents.

Legend: h hidden state [H] and h' its tangent, W output layer [V, H] and W' its tangent (b and b' of the bias), z logits, p
softmax(z), H its entropy, y the target, s_v the softcap's derivative at z_v (1 without), u = ∂log p_y/∂h and u_H = ∂H/∂h
the unit gradients.

    (log p_y)' = u · h' + s_y q_y - Σ_v p_v s_v q_v,     H' = u_H · h' - Σ_v p_v (log p_v + H) s_v q_v,     q = W' h + b'

The parts in q, which a frozen output layer does not have, take it in blocks of the vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_fast.engines.forward_mode.parameters import tangent_of
from entropy_fast.ops import linear_token_logprobs_with_units
from entropy_fast.reference import linear_logits
from entropy_fast.ways.teacher_forcing import OutputLayer

__all__ = ["TokenDerivatives", "derivatives_of_hidden", "derivatives_of_logits"]

_BLOCK_BYTES = 2**24  # of one block of logits


@dataclasses.dataclass(frozen=True)
class TokenDerivatives:
    """Of some response tokens, all [rows], in fp32 or wider.

    Attributes:
        logprobs: of the targets, nats.
        of_logprobs: their derivatives.
        entropies: of the distributions, nats; None unless wanted.
        of_entropies: their derivatives, likewise.
    """

    logprobs: Tensor
    of_logprobs: Tensor
    entropies: Tensor | None
    of_entropies: Tensor | None


def derivatives_of_hidden(
    hidden: Tensor,
    layer: OutputLayer,
    targets: Tensor,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    *,
    want_entropies: bool,
) -> TokenDerivatives:
    """From hidden states, without logits.

    Args:
        hidden: [rows, H], with a tangent or without.
        layer: the output layer, without tangents.
        targets: [rows] token ids.
        of_weight: [V, H] tangent of the layer's weight, None where it is frozen.
        of_bias: [V] tangent of its bias, likewise.
        want_entropies: whether entropies and their derivatives are wanted too.
    """
    h, tangent = tangent_of(hidden)
    found = linear_token_logprobs_with_units(
        h, layer.weight, targets, bias=layer.bias, softcap=layer.softcap, want_entropy=want_entropies
    )
    through = None
    if of_weight is not None or of_bias is not None:
        through = _through_layer(h, layer, targets, of_weight, of_bias, found.lse, found.entropy)
    derivatives: list[Tensor | None] = []
    for place, units in enumerate((found.unit_logprob, found.unit_entropy)):
        if units is None:
            derivatives.append(None)
            continue
        derivative = torch.zeros_like(found.logprob)
        if tangent is not None:
            derivative = (units * tangent.to(units.dtype)).sum(-1)
        derivatives.append(derivative if through is None else derivative + through[place])
    of_logprobs, of_entropies = derivatives
    assert of_logprobs is not None
    entropies = None if found.entropy is None else found.entropy.to(found.logprob.dtype)
    return TokenDerivatives(found.logprob, of_logprobs, entropies, of_entropies)


def _through_layer(
    h: Tensor,
    layer: OutputLayer,
    targets: Tensor,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[rows] s_y q_y - Σ_v p_v s_v q_v, and - Σ_v p_v (log p_v + H) s_v q_v (0 without H)."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    at_target, total, weighted, spread, offset = (torch.zeros(len(h), dtype=dtype, device=h.device) for _ in range(5))
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
        # Divided by their own sum, and deviations counted from their own mean: lse and entropy, of logits that may have been
        # rounded otherwise, only keep them in range.
        logprobs = z - lse.to(dtype).unsqueeze(1)
        weights = logprobs.exp()
        total += weights.sum(1)
        weighted += (weights * q).sum(1)
        if entropy is not None:
            # Where p is 0 its log may be -inf.
            deviation = torch.where(weights > 0, logprobs + entropy.to(dtype).unsqueeze(1), 0.0)
            offset += (weights * deviation).sum(1)
            spread += (weights * deviation * q).sum(1)
        here = (targets >= begin) & (targets < begin + z.shape[1])
        picked = q.gather(1, (targets - begin).clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
        at_target = torch.where(here, picked, at_target)
    mean = weighted / total
    return at_target - mean, (offset * mean - spread) / total


def derivatives_of_logits(logits: Tensor, targets: Tensor, *, want_entropies: bool) -> TokenDerivatives:
    """From logits: z'_y - Σ_v p_v z'_v and - Σ_v p_v (log p_v + H) z'_v.

    Args:
        logits: [rows, V], with a tangent or without.
        targets: [rows] token ids.
        want_entropies: whether entropies and their derivatives are wanted too.
    """
    z, tangent = tangent_of(logits)
    dtype = torch.promote_types(z.dtype, torch.float32)
    values, derivatives, entropies, of_entropies = (torch.zeros(len(z), dtype=dtype, device=z.device) for _ in range(4))
    step = max(16, _BLOCK_BYTES // (z.shape[1] * dtype.itemsize))
    for begin in range(0, len(z), step):
        rows = slice(begin, begin + step)
        chosen = targets[rows].unsqueeze(1)
        logprobs = torch.log_softmax(z[rows].to(dtype), dim=-1)
        values[rows] = logprobs.gather(1, chosen).squeeze(1)
        probabilities = logprobs.exp()
        weighted = torch.where(probabilities > 0, probabilities * logprobs, 0.0) if want_entropies else None
        if weighted is not None:
            entropies[rows] = -weighted.sum(1)
        if tangent is None:
            continue
        along = tangent[rows].to(dtype)
        derivatives[rows] = along.gather(1, chosen).squeeze(1) - (probabilities * along).sum(1)
        if weighted is not None:
            of_entropies[rows] = -((weighted + probabilities * entropies[rows].unsqueeze(1)) * along).sum(1)
    if not want_entropies:
        return TokenDerivatives(values, derivatives, None, None)
    return TokenDerivatives(values, derivatives, entropies, of_entropies)
