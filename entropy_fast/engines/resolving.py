"""Columns that wait for scores of the whole batch, resolved before anything is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from entropy_fast.columns import Columns, ResolvedColumn, Side, TokenScores
from entropy_fast.context import ProbeContext
from entropy_fast.rollouts import Rollouts

__all__ = ["resolved_context"]


def resolved_context(
    context: ProbeContext, entropy: Rollouts | None, update: Rollouts | None, score: Callable[[Rollouts], TokenScores]
) -> ProbeContext:
    """The context with columns that any microbatch can be weighed by.

    Args:
        context: of the probe.
        entropy: the entropy batch, without empty responses; None leaves its columns as they are.
        update: the update batch, likewise; the same object where there is one batch.
        score: what the policy says of a batch; called once for each that a column waits for.
    """
    batches = {Side.FUNCTIONAL: entropy, Side.UPDATE: update}
    known: dict[int, TokenScores] = {}
    columns = []
    for column in context.columns:
        batch = batches[column.side]
        if isinstance(column, ResolvedColumn) and batch is not None:
            if id(batch) not in known:
                wide = any(p.dtype == torch.float64 for p in context.registry.tensors)
                dtype = torch.float64 if wide else torch.float32
                given = context.scores if batch is update else None
                known[id(batch)] = (given or score(batch)).to(device=context.device, dtype=dtype)
            column = column.resolved(known[id(batch)], batch)
        columns.append(column)
    return dataclasses.replace(context, columns=Columns(tuple(columns))) if known else context
