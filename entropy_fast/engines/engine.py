"""What an engine is, and what has to be known of one to choose it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from entropy_fast.columns import TokenScores
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.context import ProbeContext
from entropy_fast.estimates.measured import Measured
from entropy_fast.rollouts import Rollouts

__all__ = ["COMMON", "Engine", "EngineKind", "Scores"]

COMMON = frozenset({"engine", "when_busy"})


class Engine(Protocol):
    """Measures; made for every estimate anew. It writes nothing into the context or the rollouts."""

    def same_batch(self, rollouts: Rollouts) -> Measured:
        """Kernel sums over the units of one batch, with their diagonal.

        Args:
            rollouts: without empty responses.

        Raises:
            GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
            ModelStateError: two forwards of the same sequences differ, or sequences interact.
            ProbeMemoryError: memory ran out with a single prompt.
        """

    def two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        """Kernel sums between an entropy batch and an independent update batch; arguments and errors as of `same_batch`."""


@runtime_checkable
class Scores(Protocol):
    """An engine that also says what the policy says of a batch."""

    def score(self, rollouts: Rollouts) -> TokenScores:
        """Log-probs and entropies of every response token of a batch without empty responses."""


@dataclasses.dataclass(frozen=True)
class EngineKind:
    """One engine, by name.

    Attributes:
        name: what ``RunOptions(engine=...)`` calls it.
        make: from a context.
        takes: the options in `RunOptions` that it has a use for, beside those that are about every probe (`COMMON`).
        refuses: given a number of batches (1 or 2) and the context, why it cannot do what is asked; None when it can.
        no_next_step: given the options, why it cannot measure along the optimizer's whole step; None when it can.
        by_layer: whether it reads frozen matrices of layers in their layers' forwards and backwards alone.
    """

    name: str
    make: Callable[[ProbeContext], Engine]
    takes: frozenset[str]
    refuses: Callable[[int, ProbeContext], str | None] = lambda batches, context: None
    no_next_step: Callable[[EstimateOptions, RunOptions], str | None] = lambda estimate, run: None
    by_layer: bool = False

    def why_not(self, batches: int, context: ProbeContext) -> str | None:
        """Why it cannot do what is asked with so many batches; None when it can."""
        if batches == 2 and context.run.full_kernel:
            return "full_kernel is about the same-batch estimate; the two-batch estimate does not keep K"
        return self.refuses(batches, context)

    def ignored(self, options: RunOptions) -> list[str]:
        """Names of the options that are set and that it has no use for."""
        return [name for name in options.changed() if name not in self.takes | COMMON]
