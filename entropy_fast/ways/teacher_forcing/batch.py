"""Rows of `Rollouts` laid out for one forward, padded on the right.

Whatever padding the rollouts carry, real tokens are moved to the left and padded on the right. Then no query row is
fully masked (several attention implementations give NaN there) and position ids are the same as without padding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from entropy_fast.rollouts import Rollouts

__all__ = ["PaddedBatch", "pad_rows"]

PAD_ID = 0  # any valid id will do: padded positions are neither attended to nor scored


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    """n sequences, right-padded to the longest of them.

    Attributes:
        rows: [n] row indices into the rollouts (CPU).
        input_ids: [n, T] int64.
        attention_mask: [n, T] int64, ones first.
        position_ids: [n, T] int64, cumsum(attention_mask) - 1.
        loss_mask: [n, T] int64, 1 at response tokens.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    loss_mask: Tensor

    @property
    def first_scored(self) -> int:
        """The first column that holds a response token in any row (at least 1: column 0 is never scored)."""
        return int(self.loss_mask.any(0).nonzero()[0])


def pad_rows(rollouts: Rollouts, rows: Tensor, device: torch.device) -> PaddedBatch:
    """Lay out the given rows for one forward.

    Args:
        rollouts: the sequences.
        rows: [n] row indices.
        device: where the forward runs.
    """
    attention = rollouts.attention_mask[rows.to(rollouts.attention_mask.device)].to(device)
    ids = rollouts.input_ids[rows.to(rollouts.input_ids.device)].to(device)
    loss = rollouts.loss_mask[rows.to(rollouts.loss_mask.device)].to(device)
    width = int(attention.sum(-1).max())
    # A stable sort by "is padding" keeps the order of the real tokens and drops holes along with the padding.
    order = torch.argsort(1 - attention, dim=-1, stable=True)[:, :width]
    mask = attention.gather(-1, order)
    return PaddedBatch(
        rows=rows,
        input_ids=torch.where(mask == 1, ids.gather(-1, order), PAD_ID),
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        loss_mask=loss.gather(-1, order) * mask,
    )
