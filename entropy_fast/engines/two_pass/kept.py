"""Steps of the two-pass engine's passes, of which those are left out that a process before this one has done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from entropy_fast.columns import Columns, SequenceTable
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.agreement import fingerprint
from entropy_fast.resuming import Accumulator, Held, Tables
from entropy_fast.rollouts import Rollouts

__all__ = ["kept_steps", "tables_of"]

Step = TypeVar("Step")


def kept_steps(
    context: ProbeContext,
    stage: str,
    asked: tuple[Rollouts, Columns, object],
    sums: Mapping[str, Accumulator],
    steps: Iterable[Step],
) -> Iterator[Step]:
    """Those that are still to be taken; each is done when the next is asked for.

    Args:
        context: of the probe.
        stage: in a word or two.
        asked: the batch, the columns, and what else says which steps these are.
        sums: what they add up; filled with what is known.
        steps: all of them.
    """
    rollouts, columns, which = asked
    kept = context.keeper.sweep(
        lambda: f"{stage}: {fingerprint((stage, rollouts, columns.members, which))}", Held(sums)
    )
    return kept.steps(steps)


def tables_of(table: SequenceTable | None) -> dict[str, Accumulator]:
    """A table of sequences, of which every pass writes all rows, as something that is kept; nothing where there is none."""
    if table is None:
        return {}
    return {"table": Tables({str(place): own for place, own in enumerate(table.known)}, overwritten=True)}
