"""What packed attention works on, and its forward and backward alike begin with."""

from __future__ import annotations

import dataclasses

from torch import Tensor

__all__ = ["AttentionInputs", "PrefixSums"]


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values of sequences packed end to end, and of the prefixes that they continue from.

    Attributes:
        query: [heads, N, D]; the elements of a head of a token stand next to one another, here and in the next.
        key: [key heads, N, D].
        value: likewise.
        prefix_key: [key heads, P, D]; None where no sequence has a prefix.
        prefix_value: likewise.
        sequences: [S, 5] int64 (CPU): first token of each sequence and the one after its last, the same of its prefix among
            the P, and the row of its weights. Every token is in one of them.
        scale: of the scores.
        window: keys further back than this (counting the query's own) are not seen; None for all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    sequences: Tensor
    scale: float
    window: int | None


@dataclasses.dataclass(frozen=True)
class PrefixSums:
    """Where sums over the sequences of every prefix go, for every column of weights.

    Attributes:
        weights: [C, rows] in the dtype of the sums, contiguous.
        key: [C, key heads, P, D] in fp32 or wider, contiguous; written for every prefix that has a sequence.
        value: likewise.
    """

    weights: Tensor
    key: Tensor
    value: Tensor
