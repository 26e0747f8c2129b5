"""What the sweeps of a probe say how far they have come to, and ask how far they had come before.

A probe's course is the same each time: sweeps follow one another, and what lies between follows from what they added up. So
a checkpoint holds every sweep that was begun, in their order: what it added up, and how far it had come. A later process goes
the same course; each sweep that it comes to is filled from the checkpoint, and goes on where it had been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from entropy_fast.distributed.collectives import texts_of
from entropy_fast.distributed.team import Team
from entropy_fast.errors import ResumeError
from entropy_fast.resuming.folder import CheckpointFolder
from entropy_fast.resuming.held import Held
from entropy_fast.resuming.record import CheckpointRecord, KeptFile, SweepRecord

__all__ = ["FolderKeeper", "Keeper", "KeptSweep"]

# Where nobody says how often: seconds at least, and how many times longer than sums took to write. Units' own gradients are
# written once however often that is.
SECONDS, TIMES_LONGER = 60.0, 50.0

Item = TypeVar("Item")
AGAIN = "make the very call that wrote it, pass another folder, or delete this one to begin the probe anew."


class KeptSweep:
    """One sweep, of which nothing is kept.

    Attributes:
        position: steps that were done before.
        details: what the sweep noted with them; None where it begins.
    """

    position = 0
    details: Mapping[str, Any] | None = None

    def advance(self, position: int, details: Mapping[str, Any] | None = None) -> None:
        """So many steps are done, and what has been added up is theirs; it is written where it is time.

        Raises:
            OutputFileError: it cannot be.
        """

    def interrupted(self) -> None:
        """The same, now: the process is about to end."""

    def void(self) -> None:
        """What was added up is gone; the sweep starts again."""

    def end(self, details: Mapping[str, Any] | None = None) -> None:
        """Nothing more comes; what was added up may be changed after this."""

    def steps(self, items: Iterable[Item]) -> Iterator[Item]:
        """Those that are not done yet of a sequence of steps, each of which is done when the next is asked for."""
        for number, item in enumerate(items):
            if number >= self.position:
                yield item
                self.advance(number + 1)
        self.end()


class Keeper:
    """Keeps nothing."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it in a result, in sentences."""
        return ()

    def holds(self, what: Callable[[], str]) -> bool:
        """Whether a checkpoint has a sweep that is still to come, by its name."""
        return False

    def sweep(self, what: Callable[[], str], held: Held) -> KeptSweep:
        """A sweep begins.

        Args:
            what: says which: the same text in every process that makes the same probe; asked for only where it is needed.
            held: what it adds up, empty; filled with what is known.

        Raises:
            ResumeError: the checkpoint is of another course, or damaged.
        """
        return KeptSweep()


class FolderKeeper(Keeper):
    """Keeps every sweep in a folder.

    Args:
        folder: of this rank.
        identity: of the probe, by what each text is of.
        seconds: between two checkpoints; None for what their size suggests.
        record: of the checkpoint that is there; None where none is.
        note: what a result says of it.
        clock: seconds.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        identity: Mapping[str, str],
        seconds: float | None,
        record: CheckpointRecord | None = None,
        note: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._identity, self._seconds, self._clock = folder, identity, seconds, clock
        self._found = list(record.sweeps) if record is not None else []
        self._sweeps: list[SweepRecord] = []
        self._note, self._last, self._took = note, clock(), 0.0

    @classmethod
    @contextlib.contextmanager
    def of(cls, folder: str, seconds: float | None, team: Team, identity: Mapping[str, str]) -> Iterator[FolderKeeper]:
        """For the length of a probe. All ranks open theirs together.

        Args:
            folder: of the whole checkpoint.
            seconds: between two checkpoints; None for what their size suggests.
            team: the ranks.
            identity: of the probe, by what each text is of.

        Raises:
            ResumeError: the checkpoint that is there is of another probe, or damaged.
            OutputFileError: the folder cannot be made.
        """
        with CheckpointFolder.held(folder, team) as own:
            record = own.read()
            if record is not None:
                _refuse_another(record.identity, identity, folder)
            said = texts_of(team, json.dumps(_how_far(record)))
            yield cls(own, identity, seconds, record, _note(folder, [json.loads(text) for text in said]))

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Keeper.notes`."""
        return () if self._note is None else (self._note,)

    def holds(self, what: Callable[[], str]) -> bool:
        """See `Keeper.holds`."""
        if not self._found:
            return False
        wanted = what()
        return any(record.what == wanted for record in self._found)

    def sweep(self, what: Callable[[], str], held: Held) -> KeptSweep:
        """See `Keeper.sweep`."""
        named = what()
        if not self._found:
            return _FolderSweep(self, len(self._sweeps), SweepRecord(named, 0, False, {}, ()), held)
        record = self._found.pop(0)
        if record.what != named:
            raise ResumeError(
                f"the checkpoint in {self._folder.path} goes on with '{record.what}', and this probe with '{named}': it goes "
                "another way through the batch, or its loss says something else than it did.",
                fix=AGAIN,
            )
        self._fill(record, held)
        number = len(self._sweeps)
        self._sweeps.append(record)
        return _FolderSweep(self, number, record, held)

    def forget_rest(self) -> None:
        """What came after this in the checkpoint follows from what is void now."""
        self._found = []

    def due(self) -> bool:
        """Whether it is time to write."""
        wanted = max(SECONDS, TIMES_LONGER * self._took) if self._seconds is None else self._seconds
        return self._clock() - self._last >= wanted

    def write(self, number: int, record: SweepRecord, held: Held) -> SweepRecord:
        """Write how far a sweep has come, and with it all before it.

        Args:
            number: of the sweep.
            record: where it is; its files are those of before.
            held: what it has added up.

        Returns:
            With its files as they are now.

        Raises:
            OutputFileError: it cannot be written; then the checkpoint is the one before.
        """
        there = [file for file in record.files if file.units is not None]
        reached = there[-1].units[1] if there and there[-1].units is not None else 0
        new: list[KeptFile] = []
        try:
            if held.units is not None:
                new += self._folder.write_units(number, held.units, reached, record.position)
            began = self._clock()
            new += self._folder.write_sums(number, held.kept())
            self._took = self._clock() - began
            written = dataclasses.replace(record, files=(*there, *new))
            sweeps = (*self._sweeps[:number], written)
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            self._folder.name(CheckpointRecord(self._identity, now, sweeps))
        except OSError:
            self._folder.forget(new)
            raise
        self._sweeps = list(sweeps)
        self._last = self._clock()
        return written

    def _fill(self, record: SweepRecord, held: Held) -> None:
        sums: dict[str, Tensor] = {}
        for file in record.files:
            found = self._folder.load(file)
            if file.units is None:
                sums |= found
            elif held.units is None:
                raise ResumeError(
                    f"{file.name} in {self._folder.path} has units' own gradients, which this sweep does not keep.",
                    fix=AGAIN,
                )
            else:
                held.units.restore_rows(*file.units, found)
        held.restore(sums)


class _FolderSweep(KeptSweep):
    """One sweep of a `FolderKeeper`."""

    def __init__(self, keeper: FolderKeeper, number: int, record: SweepRecord, held: Held) -> None:
        self._keeper, self._number, self._record, self._held = keeper, number, record, held
        self._unwritten = False
        self.position = record.position
        self.details = record.details if record.files else None

    def advance(self, position: int, details: Mapping[str, Any] | None = None) -> None:
        """See `KeptSweep.advance`."""
        self._record = dataclasses.replace(self._record, position=position, details=dict(details or {}), finished=False)
        self._unwritten = True
        if self._keeper.due():
            self._write()

    def interrupted(self) -> None:
        """See `KeptSweep.interrupted`."""
        if self._unwritten:
            self._write()

    def void(self) -> None:
        """See `KeptSweep.void`."""
        self._record = dataclasses.replace(self._record, position=0, details={}, finished=False, files=())
        self.position, self.details, self._unwritten = 0, None, False
        self._keeper.forget_rest()

    def end(self, details: Mapping[str, Any] | None = None) -> None:
        """See `KeptSweep.end`."""
        if not self._record.finished:
            self._record = dataclasses.replace(self._record, finished=True, details=dict(details or {}))
            self._write()

    def _write(self) -> None:
        self._record = self._keeper.write(self._number, self._record, self._held)
        self._unwritten = False


def _refuse_another(theirs: Mapping[str, str], ours: Mapping[str, str], folder: str) -> None:
    """Raise unless a checkpoint is of the same probe.

    Raises:
        ResumeError: it is not; all that differs is named.
    """
    named = [
        f"{name} ({theirs.get(name, 'nothing')} there, {ours.get(name, 'nothing')} here)"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    if named:
        raise ResumeError(f"the checkpoint in {folder} is of another probe: other {'; other '.join(named)}.", fix=AGAIN)


def _how_far(record: CheckpointRecord | None) -> list[Any] | None:
    """In words, and when; None where nothing is there."""
    if record is None or not record.sweeps:
        return None
    last = record.sweeps[-1]
    stage = last.what.rpartition(": ")[0]
    here = "all" if last.finished else f"{last.position} unit(s)"
    return [f"{here} of '{stage}' (sweep {len(record.sweeps)})", record.written]


def _note(folder: str, ranks: list[list[str] | None]) -> str | None:
    if not any(ranks):
        return None
    written = max(own[1] for own in ranks if own is not None)
    if len(ranks) == 1:
        assert ranks[0] is not None
        return f"went on from the checkpoint of {written} in {folder}: {ranks[0][0]} had been gone through."
    each = [f"rank {rank} {'nothing' if own is None else own[0]}" for rank, own in enumerate(ranks)]
    return f"went on from the checkpoint of {written} in {folder}, where {', '.join(each)} had been gone through."
