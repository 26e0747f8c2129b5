"""The order in which a figure of the influence kernel has its prompts."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage

__all__ = ["clustered_order"]


def clustered_order(shares: np.ndarray) -> list[int]:
    """The order in which prompts that change alike, and change others alike, are neighbours.

    Average linkage of rows and columns put end to end, each pair's own cells among them with 0 on the diagonal, leaves in the
    order that makes neighbours most alike.

    Args:
        shares: [M, M] with NaN on the diagonal.
    """
    if len(shares) < 3:
        return list(range(len(shares)))
    filled = np.where(np.eye(len(shares), dtype=bool), 0.0, shares)
    return [int(n) for n in leaves_list(linkage(np.hstack([filled, filled.T]), "average", optimal_ordering=True))]
