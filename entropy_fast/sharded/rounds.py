"""What ranks do together in the midst of their sweeps, without keeping step.

Ranks go through their own prompts, and come to the same place in the model at different times, if at all. Who needs the others
asks; all ranks hear that when they ask for something themselves, or where they wait for the others after a sweep, and do it
together, until nobody needs anything. So no two ranks have to do the same number of forwards, and none waits for one that
has failed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fast.distributed.team import Team

__all__ = ["Rounds"]

_NOTHING = -1
_DETAILS = 3  # numbers beside what is asked for

# Given the group, what is done, whether this rank has asked for it, and ``[ranks, details]`` of all that have; -1 of others.
Act = Callable[[dist.ProcessGroup | None, int, bool, Tensor], None]


class Rounds:
    """Requests of the ranks of one probe.

    Args:
        team: the ranks.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._acts: list[tuple[range, Act]] = []

    def offer(self, things: int, act: Act) -> int:
        """Make some things known that can be asked for: on all ranks the same, in the same order. The number of the first.

        Args:
            things: how many.
            act: does one of them, counted from 0, on all ranks.
        """
        first = sum(len(own) for own, _ in self._acts)
        self._acts.append((range(first, first + things), act))
        return first

    def ask(self, thing: int, *details: int) -> None:
        """Do a thing together with all ranks, after whatever others have asked for before.

        Raises:
            DistributedError: a rank failed or was lost.
        """
        while self._together(thing, *details) != thing:
            pass

    def serve(self) -> None:
        """Do with others what they ask for, until nobody asks for anything."""
        while self._together(_NOTHING) != _NOTHING:
            pass

    def _together(self, thing: int, *details: int) -> int:
        """Say what this rank needs, and do with all of them what somebody does; which that was."""
        taken = [_NOTHING]
        own = torch.tensor([thing, *details, *[_NOTHING] * (_DETAILS - len(details))])

        def act(group: dist.ProcessGroup | None) -> None:
            asked = [torch.empty_like(own) for _ in range(self._team.size)]
            dist.all_gather(asked, own, group=group)
            # The same on all ranks. Who is behind is waited for at what is still to come.
            taken[0] = min((int(other[0]) for other in asked if int(other[0]) != _NOTHING), default=_NOTHING)
            for things, does in self._acts:
                if taken[0] in things:
                    same = [other[1:] if int(other[0]) == taken[0] else torch.full((_DETAILS,), -1) for other in asked]
                    does(group, taken[0] - things.start, thing == taken[0], torch.stack(same))

        with torch.no_grad():
            self._team.run_between(act)
        return taken[0]
