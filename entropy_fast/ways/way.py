"""A way: how the sequences of a microbatch run forward, and backward into a recorder.

To add one, write a class with these members, which says why it cannot be taken for a model, and register it
(`entropy_fast.ways.register_way`).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

from entropy_fast.capture import CapturedModules, RowRecorder
from entropy_fast.columns import Coefficients, Columns, ScoredTokens
from entropy_fast.context import ProbeContext
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.trial import Trial

__all__ = ["Microbatch", "Passed", "Way", "WayKind"]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """What goes through a model at a time: whole prompts.

    Attributes:
        rollouts: the batch.
        rows: [n] row indices into it, those of one prompt next to one another.
        unit: [n] unit of every row, rows of one unit next to one another.
        columns: what the sequences are weighed by.
    """

    rollouts: Rollouts
    rows: Tensor
    unit: list[int]
    columns: Columns


@dataclasses.dataclass(frozen=True)
class Passed:
    """What a way learned of a microbatch beside the gradients.

    Attributes:
        sequence_logprobs: [n] S_i, nats; detached.
        coefficients: of its sequences.
    """

    sequence_logprobs: Tensor
    coefficients: Coefficients

    @classmethod
    def of(cls, scored: ScoredTokens, coefficients: Coefficients) -> Passed:
        """From scored tokens."""
        return cls(scored.sequence_logprobs, coefficients)


class Way(Protocol):
    """One way of one model; made for every probe anew."""

    @property
    def packs(self) -> bool:
        """Whether nothing is computed for padding, so that microbatches may be cut by tokens."""

    @property
    def shares(self) -> bool:
        """Whether a prompt's tokens run once for all of its responses."""

    @property
    def weighs_whole(self) -> bool:
        """Whether coefficients of a microbatch are formed all at once, and not some prompts at a time."""

    @property
    def prompt_forwards(self) -> int:
        """How often shared prompts' tokens ran forward in the microbatches so far: the most that any of them took."""

    def why_not(self, trial: Trial) -> str | None:
        """Why it cannot be taken for this model, tried on a few sequences; None when it can.

        Raises:
            ModelStateError: no way can be taken: log-probs are random, or sequences of one batch interact.
        """

    def run(self, microbatch: Microbatch, recorder: RowRecorder) -> Passed:
        """Go through a microbatch; its signals go to ``recorder``.

        Raises:
            GraphDetachedError: hidden states or log-probs have no graph, or one is NaN.
        """

    def score(self, microbatch: Microbatch) -> ScoredTokens:
        """Log-probs and entropies of a microbatch, without a graph.

        Raises:
            GraphDetachedError, RolloutsError: a log-prob is not finite.
        """

    def __str__(self) -> str:
        """How sequences are laid out and log-probs taken, in words."""


class WayKind(Protocol):
    """Makes a way for a model; the class of the way, as a rule."""

    @property
    def name(self) -> str:
        """What plans call it."""

    def __call__(self, context: ProbeContext, modules: CapturedModules) -> Way:
        """For the model of a context, some of whose parameters are captured."""
