"""Columns that wait for scores of the whole batch, resolved before anything is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from entropy_fast.columns import Columns, ResolvedColumn, Side, TokenScores
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.agreement import fingerprint, refuse_others
from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["OTHER_SCORES_FIX", "SCORES_MAY_MISS", "SCORES_MAY_MISS_IN_16_BITS", "resolved_context"]

# Nats a token by which a response's log-prob may differ between two ways of computing it.
SCORES_MAY_MISS, SCORES_MAY_MISS_IN_16_BITS = 1e-3, 0.3
OTHER_SCORES_FIX = (
    "pass those of the model as it is now, at the policy's temperature, in their tokens' columns; or none. Where a trainer "
    "made them with learned positions and padding on the left: have it pass position_ids."
)


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
                if given is not None:
                    _refuse_other_scores(context, given, batch, score)
                known[id(batch)] = (given or score(batch)).to(device=context.device, dtype=dtype)
            column = column.resolved(known[id(batch)], batch)
        columns.append(column)
    if not known:
        return context
    refuse_others(
        context.team,
        {f"coefficients of '{column.name}'": fingerprint(column) for column in columns},
        fix="a loss has to be of the whole batch and the same on all ranks: of nothing that one rank alone has, not random.",
    )
    return dataclasses.replace(context, columns=Columns(tuple(columns)))


def _refuse_other_scores(
    context: ProbeContext, given: TokenScores, batch: Rollouts, score: Callable[[Rollouts], TokenScores]
) -> None:
    """Raise where scores that were given are not the model's own, token by token, for the first prompt.

    Raises:
        RolloutsError: they are not.
    """
    rows = batch.rows_of_prompt(0)
    own = score(batch.select_rows(rows))
    narrow = any(dtype.itemsize < 4 for dtype in context.compute_dtypes)
    allowed = SCORES_MAY_MISS_IN_16_BITS if narrow else SCORES_MAY_MISS
    for what, mine, theirs in (
        ("log-probs", own.logprobs, given.logprobs[rows]),
        ("entropies", own.entropies, given.entropies[rows]),
    ):
        gap = (mine.double().cpu() - theirs.double().cpu()).abs()
        if not float(gap.max()) <= allowed:
            row = int(gap.amax(1).argmax())
            raise RolloutsError(
                f"scores: the {what} of row {int(rows[row])} (empty responses not counted) are up to {float(gap.max()):.3g} "
                "nats a token away from the model's.",
                fix=OTHER_SCORES_FIX,
            )
