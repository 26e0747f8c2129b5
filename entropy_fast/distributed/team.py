"""The ranks that work on one probe: how they meet, and what they say when one of them fails, dies or does not come.

Ranks meet before every collective operation. Who fails writes its error into the process group's store first and comes to one
more meeting, so that all of them raise the same error. Who is dead or stalls is missed there. Meetings are gloo's monitored
barriers on a group of the probe's own, whatever the training's backend is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from entropy_fast.errors import ConfigError, DistributedError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Team", "joined"]

_LONGEST_TEXT = 2000  # characters of an error that the others are shown
_GRACE = 2.0  # seconds in which who is alive says so, once one is missed
_AFTER_SIGNAL = 5.0  # seconds that who was interrupted waits for the others
_numbers = itertools.count()
_Answer = TypeVar("_Answer")


@dataclasses.dataclass(frozen=True)
class _Word:
    """What a rank that failed left for the others."""

    rank: int
    phase: str
    kind: str
    text: str


class Team:
    """This process among those that work on one probe; of a single process, every operation is nothing.

    Attributes:
        rank: of this process in the process group.
        size: how many there are.
        group: gloo's group of this probe, whose operations end after the timeout; None for a single process.
        seconds: that ranks wait for one another.
    """

    def __init__(self, store: Store | None, seconds: float) -> None:
        self.group: dist.ProcessGroup | None = None
        self._elsewhere: dist.ProcessGroup | None = None
        self.seconds = seconds
        self.rank = 0 if store is None else dist.get_rank()
        self.size = 1 if store is None else dist.get_world_size()
        self._store, self._phase = store, "the beginning"
        self._between: Callable[[], object] | None = None
        self._meetings = 0  # that this rank has come to; they have the same numbers on all ranks

    @classmethod
    def alone(cls) -> Team:
        """Of this process by itself."""
        return cls(None, 0.0)

    @classmethod
    def join(cls, seconds: float) -> Team:
        """All ranks of the process group that is there; every one of them has to call this.

        Args:
            seconds: that ranks wait for one another, here and later.

        Raises:
            ConfigError: there is no process group.
            DistributedError: a rank did not come.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "ranks='all' and torch.distributed has no process group in this process.",
                fix="start it by torchrun and call torch.distributed.init_process_group, or pass ranks='own'.",
            )
        if dist.get_world_size() == 1:
            return cls.alone()
        world = dist.group.WORLD
        assert world is not None
        within = f"entropy_fast/{next(_numbers)}"
        store = dist.PrefixStore(within, world.get_group_store())  # type: ignore[attr-defined]
        _wait_for_all(store, seconds)
        team = cls(store, seconds)
        try:
            team.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            team._lost(error)
        return team

    def enter(self, phase: str) -> None:
        """From here on this rank is at a phase, which is what the others are told if it fails or vanishes."""
        self._phase = phase
        if self.size > 1:
            self._in_store(lambda store: store.set(f"phase/{self.rank}", phase))

    def meet(self) -> None:
        """Wait for all ranks.

        Raises:
            DistributedError: one has failed, has died or has not come; the same on all of them.
        """
        if self.size == 1:
            return
        if self._between is not None:
            self._between()
        self._look()

    def run(self, operation: Callable[[dist.ProcessGroup | None], object], device: torch.device | None = None) -> None:
        """A collective operation, after a meeting.

        Args:
            operation: given the group. It must not be kept elsewhere: who waits for a rank that has given up is let go when the
                group is no more.
            device: of its tensors; None for the CPU.

        Raises:
            DistributedError: see `meet`; or a rank was lost in the middle of it.
        """
        self.meet()
        self._operate(operation, device)

    def run_between(self, operation: Callable[[dist.ProcessGroup | None], object]) -> None:
        """A collective operation of which there is no same number on all ranks, on tensors of the CPU.

        Who has come to a meeting takes part from there: `serving`.

        Args:
            operation: see `run`.

        Raises:
            DistributedError: see `meet`.
        """
        self._look()
        self._operate(operation, None)

    @contextlib.contextmanager
    def serving(self, between: Callable[[], object]) -> Iterator[None]:
        """Before every meeting, ``between`` is called: it takes part in others' `run_between` until all have come to it."""
        self._between = between
        try:
            yield
        finally:
            self._between = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around everything that ranks do with one another.

        Raises:
            DistributedError: a rank failed, died or did not come; it names the rank and the phase. An error that all of them
                have alike is raised as it is.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self.meet()
        except DistributedError as error:
            if error.agreed:
                raise
            self._fail(error)
        except BaseException as error:
            self._fail(error)

    def leave(self, *, at_once: bool = False) -> None:
        """Give the groups back. Operations of others that wait for this rank end.

        Args:
            at_once: whether others may still be in one. Otherwise ranks wait a moment for one another: who has come through a
                meeting must not end it for the first rank, which is through when its answers have arrived.
        """
        if self.group is not None and not at_once:
            self._let_through()
        for group in (self.group, self._elsewhere):
            if group is not None:
                with contextlib.suppress(RuntimeError, ValueError):
                    dist.destroy_process_group(group)
        del group
        self.group = self._elsewhere = None

    def _look(self) -> None:
        """Wait for all ranks, and raise where one has failed."""
        self._barrier(self.seconds)
        # Not at a later meeting, which others may have come to already.
        if self._has(f"failed/{self._meetings}"):
            raise self._of_words(self._words())

    def _operate(self, operation: Callable[[dist.ProcessGroup | None], object], device: torch.device | None) -> None:
        try:
            operation(self.group if device is None or device.type == "cpu" else self._group_elsewhere())
        except RuntimeError as error:
            self._lost(error)

    def _group_elsewhere(self) -> dist.ProcessGroup:
        """For tensors that are not on the CPU, by the training's own backend."""
        if self._elsewhere is None:
            self._elsewhere = dist.new_group(timeout=datetime.timedelta(seconds=self.seconds))
        return self._elsewhere

    def _fail(self, error: BaseException) -> None:
        """Tell the others, wait for them, and raise what all of them raise."""
        signal = isinstance(error, KeyboardInterrupt)
        text = "interrupted by a signal" if signal else (str(error) or type(error).__name__)
        said = json.dumps([self._phase, type(error).__name__, text[:_LONGEST_TEXT]])
        self._in_store(lambda store: store.set(f"error/{self.rank}", said))
        self._in_store(lambda store: store.set(f"failed/{self._meetings + 1}", "1"))
        self._barrier(min(self.seconds, _AFTER_SIGNAL) if signal else self.seconds)
        words = self._words()
        found = self._of_words(words)
        if len({(word.kind, word.text) for word in words}) == 1 and len(words) == self.size:
            raise error
        raise found from error

    def _barrier(self, seconds: float) -> None:
        self._meetings += 1
        # The first rank waits for each of the others and names who is missed; its own lateness comes on top for them.
        patience = datetime.timedelta(seconds=seconds if self.rank == 0 else 2 * seconds + _GRACE)
        try:
            dist.monitored_barrier(self.group, timeout=patience, wait_all_ranks=True)
        except RuntimeError as error:
            self._lost(error)

    def _lost(self, cause: RuntimeError) -> None:
        """Find out with the others that are left who is missing, and raise that.

        Raises:
            DistributedError: always.
        """
        self._in_store(lambda store: store.set(f"alive/{self.rank}", "1"))
        # Who waits for this rank in an operation that can no longer end is let go, once nothing here holds the group.
        traceback.clear_frames(cause.__traceback__)
        self.leave(at_once=True)
        until = time.monotonic() + _GRACE
        missing: list[int] = []
        while time.monotonic() < until:
            with contextlib.suppress(KeyboardInterrupt):  # who ends all ranks together is told why all the same
                missing = [rank for rank in range(self.size) if not self._heard(rank)]
                if not missing or self._has("verdict"):
                    break
                time.sleep(0.02)
        found = json.dumps([[rank, self._phase_of(rank)] for rank in missing])
        agreed = self._in_store(lambda store: store.compare_set("verdict", "", found))
        raise self._of_words(self._words(), json.loads(agreed), cause) from cause

    def _heard(self, rank: int) -> bool:
        return self._has(f"alive/{rank}") or self._has(f"error/{rank}")

    def _phase_of(self, rank: int) -> str:
        return self._get(f"phase/{rank}") if self._has(f"phase/{rank}") else "the beginning"

    def _words(self) -> list[_Word]:
        """Of all that failed, by rank."""
        told = [rank for rank in range(self.size) if self._has(f"error/{rank}")]
        return [_Word(rank, *json.loads(self._get(f"error/{rank}"))) for rank in told]

    def _of_words(
        self, words: list[_Word], missing: list[tuple[int, str]] | None = None, cause: RuntimeError | None = None
    ) -> DistributedError:
        gone = [
            f"rank {rank} is gone or did not come within {self.seconds:g} s (it was at '{at}')"
            for rank, at in missing or ()
        ]
        if missing:
            # A launcher ends all when it sees that one has died; who was ended so is no reason.
            words = [word for word in words if word.kind != KeyboardInterrupt.__name__]
        said = [f"rank {word.rank} failed at '{word.phase}': {word.kind}: {word.text}" for word in words]
        self._let_read(tuple(rank for rank, _ in missing or ()))
        # Where both are known, who failed first is why others went.
        problem = "; ".join(said + gone) or f"the ranks lost one another at '{self._phase}': {_first_line(cause)}"
        fix = "look at that rank's own messages; all ranks have stopped, and nothing of this probe was kept."
        return DistributedError(
            f"{problem}.",
            fix=fix,
            ranks=tuple(sorted({word.rank for word in words} | {rank for rank, _ in missing or ()})),
            lost=tuple(rank for rank, _ in missing or ()),
            agreed=True,
        )

    def _let_read(self, gone: tuple[int, ...]) -> None:
        """What was found is read. The first rank, with which the store may go, waits for the others to have done so too."""
        with contextlib.suppress(DistributedError):
            self._in_store(lambda store: store.set(f"read/{self.rank}", "1"))
            keys = [f"read/{rank}" for rank in range(self.size) if rank not in gone]
            until = time.monotonic() + (_GRACE if self.rank == 0 else 0.0)
            while time.monotonic() < until and not self._has(*keys):
                time.sleep(0.01)

    def _let_through(self) -> None:
        """Until all ranks are about to leave, or have left; or after a moment, where one never will."""
        with contextlib.suppress(DistributedError):
            self._in_store(lambda store: store.set(f"through/{self.rank}", "1"))
            until = time.monotonic() + _GRACE
            while time.monotonic() < until and not all(
                self._has(f"through/{rank}") or self._has(f"alive/{rank}") for rank in range(self.size)
            ):
                time.sleep(0.002)

    def _has(self, *keys: str) -> bool:
        return self._in_store(lambda store: store.check(list(keys)))

    def _get(self, key: str) -> str:
        return self._in_store(lambda store: store.get(key)).decode()

    def _in_store(self, action: Callable[[Store], _Answer]) -> _Answer:
        assert self._store is not None
        try:
            return action(self._store)
        except RuntimeError as error:
            raise DistributedError(
                f"the process group's store does not answer at '{self._phase}' ({_first_line(error)}): rank 0, or the "
                "launcher, which keep it, are gone.",
                fix="look at their messages; this rank has stopped, and nothing of this probe was kept.",
                ranks=(0,),
                lost=(0,),
                agreed=True,
            ) from error


@contextlib.contextmanager
def joined(ranks: str, seconds: float, team: Team | None = None) -> Iterator[Team]:
    """The ranks of one probe, `Team.together`.

    Args:
        ranks: ``own`` for this process alone, ``all`` for those of the process group.
        seconds: that they wait for one another.
        team: where the caller has joined already.
    """
    if team is not None:
        yield team
        return
    team = Team.alone() if ranks == "own" else Team.join(seconds)
    try:
        with team.together():
            yield team
    finally:
        team.leave()


def _wait_for_all(store: Store, seconds: float) -> None:
    """Until every rank has come.

    Raises:
        DistributedError: one has not.
    """
    rank, size, until = dist.get_rank(), dist.get_world_size(), time.monotonic() + seconds
    store.set(f"here/{rank}", "1")
    missing = [other for other in range(size) if other != rank]
    pause = 0.001
    while missing := [other for other in missing if not store.check([f"here/{other}"])]:
        if time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise DistributedError(
                f"rank {names} did not come to the probe within {seconds:g} s.",
                fix="call it on every rank, at the same place; or pass ranks='own'.",
                ranks=tuple(missing),
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _first_line(error: BaseException | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
