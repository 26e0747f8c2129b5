"""The ranks of one training, as its forecasts need them: what any of them fails at, none of them goes past.

A forecast goes through phases. In each of them the ranks may exchange what they like; an exception on one of them is one on
all, so that all agree on what there is. Who has gone for good ends the forecasts of the others, not their training: that ends
as it would without.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from entropy_fast.columns import TokenScores
from entropy_fast.distributed.collectives import texts_of
from entropy_fast.distributed.rows import gather_rows
from entropy_fast.distributed.team import Team
from entropy_fast.errors import DistributedError
from entropy_fast.integrations.step_window import StepWindow

__all__ = ["TrainingRanks", "gathered_window", "said_by_first"]

_LOGPROB, _ENTROPY, _ON_POLICY, _FUNCTIONAL = "of_logprob", "of_entropy", "on_policy", "functional "
_SCORES = ("scores of log-probs", "scores of entropies")


class TrainingRanks:
    """This process among those of a training.

    Args:
        together: whether they make forecasts together; False for a process by itself.
        seconds: that they wait for one another.

    Attributes:
        together: likewise.
    """

    def __init__(self, together: bool = False, seconds: float = 600.0) -> None:
        self.together, self._seconds = together, seconds
        self._team: Team | None = None
        self._lost: str | None = None

    @property
    def first(self) -> bool:
        """Whether this one writes files and warnings for all."""
        return not self.together or dist.get_rank() == 0

    def says(self, error: Exception) -> bool:
        """Whether this rank is one to warn of an error: the first, of what all of them have; and whoever it is about."""
        agreed = isinstance(error, DistributedError) and error.agreed
        return not agreed or self.first or dist.get_rank() in getattr(error, "ranks", ())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Team]:
        """Around what ranks do together, at the same place of all of them.

        Raises:
            DistributedError: a rank failed, died or did not come; on all of them.
        """
        if not self.together:
            yield Team.alone()
            return
        if self._lost is not None:
            raise DistributedError(
                f"there are no more forecasts: {self._lost}",
                fix="look at that rank's own messages, and begin the training again.",
            )
        try:
            self._team = team = self._team or Team.join(self._seconds)
            with team.together():
                team.enter(name)
                yield team
        except BaseException as error:
            # What was said in the store of a team that failed stays there: the next phase is another team's.
            self.leave()
            if isinstance(error, DistributedError) and (error.lost or not error.agreed):
                self._lost = error.problem
            raise

    def leave(self) -> None:
        """Give the process group of the forecasts back."""
        team, self._team = self._team, None
        if team is not None:
            team.leave()


def said_by_first(team: Team, value: Any) -> Any:
    """What the first rank says of something that clocks or files decide; anything that JSON has, NaN included."""
    return value if team.size == 1 else json.loads(texts_of(team, json.dumps(value if team.rank == 0 else None))[0])


def gathered_window(team: Team, own: StepWindow) -> StepWindow:
    """The rows of all ranks as one window, the same on all of them.

    Group ids have to be global. Every rank's coefficients are those of its own loss, and the gradient is the mean of theirs,
    as DistributedDataParallel makes it: the window's are divided by the number of ranks.

    Args:
        team: the ranks.
        own: of this one.

    Raises:
        DistributedError: a rank failed or did not come, or ranks hold other fields.
        RolloutsError: rows do not fit together.
    """
    if team.size == 1:
        return own
    told = [json.loads(text) for text in texts_of(team, json.dumps(_told(own)))]
    tables = {_LOGPROB: own.of_logprob / team.size}
    if any(found["entropies"] for found in told):
        # A rank without any has no gradient by entropies.
        mine = own.of_entropy if own.of_entropy is not None else torch.zeros_like(own.of_logprob)
        tables[_ENTROPY] = mine / team.size
    if own.scores is not None and all(found["scores"] for found in told):
        tables |= dict(zip(_SCORES, (own.scores.logprobs, own.scores.entropies), strict=True))
    if own.on_policy is not None and all(found["on_policy"] for found in told):
        tables[_ON_POLICY] = own.on_policy
    common = [name for name in own.functionals if all(name in found["functionals"] for found in told)]
    tables |= {_FUNCTIONAL + name: own.functionals[name] for name in common}
    whole = gather_rows(own.rollouts, tables, team=team)
    scores = [whole.tables.get(name) for name in _SCORES]
    return StepWindow(
        whole.rollouts,
        whole.tables[_LOGPROB],
        whole.tables.get(_ENTROPY),
        None if scores[0] is None or scores[1] is None else TokenScores(scores[0], scores[1]),
        {name: whole.tables[_FUNCTIONAL + name] for name in common},
        whole.tables.get(_ON_POLICY),
        next((found["skipped"] for found in told if found["skipped"] is not None), None),
        own.clip,
        own.decode,
    )


def _told(own: StepWindow) -> dict[str, Any]:
    return {
        "entropies": own.of_entropy is not None,
        "scores": own.scores is not None,
        "on_policy": own.on_policy is not None,
        "functionals": list(own.functionals),
        "skipped": own.skipped,
    }
