"""δH₁ taken apart: by parameter, by layer and by sequence. The parts add up to it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from entropy_fast.rollouts import EmptyResponseReport

__all__ = ["Role", "SequenceContributions", "by_layer", "by_parameter", "layer_of", "sequence_contributions"]

Role = Literal["both", "entropy", "update"]

# Names that decoders give to the list of their layers; the number of a layer follows.
_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|layer|h|blocks|block)\.\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class SequenceContributions:
    """Every sequence's part in δH₁, in the unit of δH₁; all [N], in the row order of the rollouts that were passed.

    Attributes:
        delta_h1: its share; the shares of one batch add up to δH₁, those of a prompt's sequences to the prompt's share.
        as_entropy: the part by its own log-prob's place in the entropy, under the other prompts' updates; None for an update
            batch.
        as_update: the part by its own update, on the other prompts' entropy; None for an entropy batch.
        counted: False for rows without response tokens, which were left out of the estimate: their shares are 0, because
            nothing of δH₁ comes from them.
    """

    delta_h1: Tensor
    as_entropy: Tensor | None
    as_update: Tensor | None
    counted: Tensor


def by_parameter(names: Sequence[str], parts: Tensor | None, factor: float) -> dict[str, float] | None:
    """Shares of δH₁ by parameter name, None where the engine did not take the sums apart.

    Args:
        names: in registry order.
        parts: [number of parameters] of the sum that δH₁ is ``factor`` times.
        factor: the learning rate divided by the number of pairs.
    """
    if parts is None:
        return None
    return dict(zip(names, (factor * parts).tolist(), strict=True))


def layer_of(name: str) -> str:
    """The decoder layer a parameter belongs to, ``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``.

    For parameters outside of layers (embeddings, the final norm) the path of their module.
    """
    found = _LAYER.match(name)
    return name.rpartition(".")[0] if found is None else found[0]


def by_layer(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of parameters added up by `layer_of`, in the order in which layers first come."""
    found: dict[str, float] = {}
    for name, share in shares.items():
        layer = layer_of(name)
        found[layer] = found.get(layer, 0.0) + share
    return found


def sequence_contributions(
    entropy: Tensor | None, update: Tensor | None, empty: EmptyResponseReport, *, entropy_alone: bool = False
) -> SequenceContributions:
    """Shares of one batch's sequences.

    Args:
        entropy: [n] shares by entropy of the sequences that were not left out; None for an update batch.
        update: [n] shares by update; None for an entropy batch.
        empty: what was left out.
        entropy_alone: whether the shares of δH₁ are those by entropy: a part of the step is nobody's update.
    """
    known = [part for part in (entropy, update) if part is not None]
    counted = torch.ones(len(known[0]) + len(empty.sequences), dtype=torch.bool)
    counted[list(empty.sequences)] = False

    def spread(part: Tensor) -> Tensor:
        shares = torch.zeros(len(counted), dtype=torch.float64)
        shares[counted] = part
        return shares

    return SequenceContributions(
        delta_h1=spread(known[0] if entropy_alone else sum(known[1:], known[0]) / len(known)),
        as_entropy=None if entropy is None else spread(entropy),
        as_update=None if update is None else spread(update),
        counted=counted,
    )
