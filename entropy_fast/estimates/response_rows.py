"""Where the numbers of sequences and tokens stand in the rollouts that they are of."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from entropy_fast.rollouts import EmptyResponseReport, Rollouts

__all__ = ["ResponseRows", "response_rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class ResponseRows:
    """Of the n sequences of a batch that were counted, in its order; int64 on the CPU.

    Attributes:
        row: [n] their rows in the rollouts that were passed.
        prompt: [n] which prompt each answers, counted from 0 in the order in which prompts with responses first appear.
        group_id: [n] that prompt's group id.
        input_ids: [n, T] tokens, in the columns of the rollouts; None unless numbers of tokens are known.
        response_mask: [n, T] True at response tokens, likewise.
    """

    row: Tensor
    prompt: Tensor
    group_id: Tensor
    input_ids: Tensor | None = None
    response_mask: Tensor | None = None


def response_rows(batch: Rollouts, empty: EmptyResponseReport, *, tokens: bool) -> ResponseRows:
    """Of a batch that rows without response tokens were left out of.

    Args:
        batch: without them.
        empty: which they were.
        tokens: whether numbers of tokens are known.
    """
    counted = torch.ones(batch.n_sequences + len(empty.sequences), dtype=torch.bool)
    counted[list(empty.sequences)] = False
    return ResponseRows(
        counted.nonzero().squeeze(-1),
        batch.prompt_index,
        batch.group_ids.cpu(),
        batch.input_ids.cpu() if tokens else None,
        batch.loss_mask.cpu() == 1 if tokens else None,
    )
