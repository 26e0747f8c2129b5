"""The two-batch estimate: an entropy batch E and an independent update batch U.

Legend: X̄ mean of X_n over the B_E entropy prompts, Ȳ mean of Y_m over the B_U update prompts; s_n = X_n · Ȳ and
t_m = Y_m · X̄. The estimate is X̄ · Ȳ. With the update held fixed its variance is V_X = var(s_n) / B_E; unconditionally the
update batch adds V_Y = var(t_m) / B_U. V_X + V_Y counts the cross term of both fluctuations twice: an upper bound.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

__all__ = ["TwoBatchEstimate", "two_batch_estimate"]


@dataclasses.dataclass(frozen=True)
class TwoBatchEstimate:
    """X̄ · Ȳ and its variances, before multiplication by the learning rate.

    Attributes:
        value: X̄ · Ȳ.
        projections: [B_E] s_n = X_n · Ȳ.
        update_projections: [B_U] t_m = Y_m · X̄; None where they are not known.
        v_x: variance from the entropy batch alone; None with a single entropy prompt.
        v_y: variance from the update batch alone; None with a single update prompt, and where t_m are not known.
        se_conditional: sqrt(V_X), about the change by this very update.
        se_total: sqrt(V_X + V_Y), an upper bound for the change by an update from another batch.
        pairs: B_E B_U, what X_sum · Y_sum is divided by.
    """

    value: float
    projections: Tensor
    update_projections: Tensor | None
    v_x: float | None
    v_y: float | None
    se_conditional: float | None
    se_total: float | None
    pairs: int


def two_batch_estimate(
    x_dot_y: float, row_sums: Tensor, column_sums: Tensor | None, n_update: int | None = None
) -> TwoBatchEstimate:
    """The estimate from sums over K [B_E, B_U].

    Args:
        x_dot_y: X_sum · Y_sum.
        row_sums: [B_E] X_n · Y_sum.
        column_sums: [B_U] Y_m · X_sum; None where they are not known, and then V_Y is not either.
        n_update: B_U; needed where ``column_sums`` does not tell it.
    """
    if column_sums is not None:
        n_update = column_sums.shape[0]
    assert n_update is not None
    n_entropy = row_sums.shape[0]
    projections = row_sums.to(torch.float64) / n_update
    update_projections = None if column_sums is None else column_sums.to(torch.float64) / n_entropy
    v_x = _variance_of_mean(projections)
    v_y = None if update_projections is None else _variance_of_mean(update_projections)
    return TwoBatchEstimate(
        value=x_dot_y / (n_entropy * n_update),
        projections=projections,
        update_projections=update_projections,
        v_x=v_x,
        v_y=v_y,
        se_conditional=None if v_x is None else math.sqrt(v_x),
        se_total=None if v_x is None or v_y is None else math.sqrt(v_x + v_y),
        pairs=n_entropy * n_update,
    )


def _variance_of_mean(values: Tensor) -> float | None:
    if values.shape[0] < 2:
        return None
    return float(values.var(correction=1)) / values.shape[0]
