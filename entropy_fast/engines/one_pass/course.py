"""How far a sweep has come, and what of it a later process has to know to go on in the same microbatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from entropy_fast.errors import ResumeError

__all__ = ["Course", "MicrobatchLimit", "SweepReport"]


@dataclasses.dataclass
class MicrobatchLimit:
    """How much goes into one forward, lowered where memory runs out; one for all sweeps of a probe.

    Attributes:
        tokens: where microbatches are cut by tokens.
        prompts: where a number of prompts was asked for; None elsewhere.
    """

    tokens: int
    prompts: int | None


@dataclasses.dataclass
class SweepReport:
    """What a sweep did.

    Attributes:
        microbatches: that were gone through.
        largest: tokens of the largest.
        halved: how often memory ran out and a microbatch was halved.
        prompt_forwards: see `Way.prompt_forwards`.
        void: 1 where it was broken off, and all ranks have to begin anew; else 0.
    """

    microbatches: int = 0
    largest: int = 0
    halved: int = 0
    prompt_forwards: int = 1
    void: int = 0


@dataclasses.dataclass
class Course:
    """Of a sweep.

    Attributes:
        waiting: numbers of the units of every group that is still to be gone through.
        report: of what was.
    """

    waiting: list[list[int]]
    report: SweepReport = dataclasses.field(default_factory=SweepReport)

    def position(self, n_units: int) -> int:
        """Units that are done: all before the first that waits."""
        return self.waiting[0][0] if self.waiting else n_units

    def details(self, limit: MicrobatchLimit, left_out: Sequence[str], way: str) -> dict[str, Any]:
        """As JSON has it.

        Args:
            limit: of a microbatch, as it is now.
            left_out: parameters on the slower path.
            way: that microbatches go.
        """
        return {
            "waiting": list(self.waiting),
            "report": dataclasses.asdict(self.report),
            "limit": dataclasses.asdict(limit),
            "left_out": list(left_out),
            "way": way,
        }

    @classmethod
    def from_details(cls, details: Mapping[str, Any], position: int, n_units: int) -> tuple[Course, MicrobatchLimit]:
        """From `details`, and the limit with it.

        Raises:
            ResumeError: it is not what that gives.
        """
        try:
            waiting = [[int(number) for number in group] for group in details["waiting"]]
            report = SweepReport(**{key: int(value) for key, value in details["report"].items()})
            tokens, prompts = details["limit"]["tokens"], details["limit"]["prompts"]
            limit = MicrobatchLimit(int(tokens), None if prompts is None else int(prompts))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from error
        if [number for group in waiting for number in group] != list(range(position, n_units)) or not all(waiting):
            raise _damaged(f"the units that wait are not those from {position} to {n_units}")
        return cls(waiting, report), limit


def _damaged(reason: str) -> ResumeError:
    return ResumeError(
        f"a checkpoint does not say how its sweep goes on: {reason}.",
        fix="delete its folder to begin the probe anew.",
    )
