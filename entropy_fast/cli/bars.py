"""How far a command has come: one bar at a time on standard error, with rate and time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from entropy_fast.cli.console import errors, is_terminal, output
from entropy_fast.errors import escaped
from entropy_fast.report.text import fitted

__all__ = ["Bars", "progress"]

PATIENCE = 2.0  # seconds after which a bar appears
BETWEEN_LINES = 15.0  # seconds from one line to the next where there is no terminal
LONGEST = 60  # characters of what is done
NAMED = 2  # columns of a sweep that are named where it has more than one more
UNITS = {"sampling": "step", "multiples": "multiple"}  # of stages that are not counted in prompts


class _LateProgress(Progress):
    """That shows nothing in its first seconds."""

    def __init__(self, *columns: ProgressColumn, console: Console, clock: Callable[[], float]) -> None:
        self._clock, self._began = clock, clock()
        # What is said meanwhile goes over the bar by `Bars.say`: taken from standard output it would end on standard error.
        super().__init__(
            *columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=4, get_time=clock
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars, once it is time."""
        if self._clock() - self._began >= PATIENCE:
            yield from super().get_renderables()


class _Counts(ProgressColumn):
    """``12/128 prompts, 3.1 prompts/s, 0:00:37 left``; elapsed time where nothing is counted."""

    def render(self, task: Task) -> Text:
        """One line without a break."""
        if task.total is None:
            return Text(_duration(task.elapsed or 0.0))
        unit = str(task.fields["unit"])
        shown = f"{task.completed:.0f}/{task.total:.0f} {unit}s"
        if not task.speed or task.time_remaining is None:
            return Text(f"{shown}, {_duration(task.elapsed or 0.0)}")
        rate = f"{task.speed:.3g} {unit}s/s" if task.speed >= 1 else f"{1 / task.speed:.2g} s/{unit}"
        return Text(f"{shown}, {rate}, {_duration(task.time_remaining)} left")


class _Lines:
    """A line now and then, in the place of a bar: for logs, and for who waits without a terminal.

    Args:
        console: where they go.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._last = clock()
        self._began: dict[str, tuple[float, int]] = {}  # when a stage was first heard of, and what was done of it then

    def report(self, what: str, done: int, total: int, unit: str) -> None:
        """Say how far a stage is, if nothing was said for a while."""
        now = self._clock()
        since, before = self._began.setdefault(what, (now, done))
        if done >= total:
            del self._began[what]
        if now - self._last < BETWEEN_LINES:
            return
        self._last = now
        left = f", {_duration((now - since) * (total - done) / (done - before))} left" if done > before else ""
        self._console.print(Text(f"{_shown(what)}: {done}/{total} {unit}s{left}"), soft_wrap=True)


class Bars:
    """What a command reports to.

    Args:
        bars: where to show it; None for nowhere.
        doing: what the command does as long as no stage of it is counted.
        lines: what says it where there is no bar; None for nothing.
    """

    def __init__(self, bars: Progress | None, doing: str, lines: _Lines | None = None) -> None:
        self._bars, self._doing, self._lines = bars, doing, lines
        self._stages: dict[str, TaskID] = {}
        if bars is not None:
            self._uncounted = bars.add_task(_shown(doing), total=None, unit="")

    def report(self, stage: str, done: int, total: int) -> None:
        """Show this stage and no other; one that is done is taken down, and may come again."""
        what, unit = f"{self._doing}: {_named(stage)}", UNITS.get(stage, "prompt")
        if self._bars is None:
            if self._lines is not None:
                self._lines.report(what, done, total, unit)
            return
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(_shown(what), total=total, unit=unit)
        self._bars.update(self._stages[stage], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._stages.pop(stage))
        for name, task in self._stages.items():
            self._bars.update(task, visible=name == stage)
        self._bars.update(self._uncounted, visible=stage not in self._stages)

    def say(self, sentence: str) -> None:
        """Print a sentence of ours on standard output, over the bar where both are on one terminal."""
        console = output()
        if self._bars is None or not is_terminal(console.file):
            console.print(Text(escaped(sentence)))
        else:
            self._bars.console.print(Text(escaped(sentence)))


@contextlib.contextmanager
def progress(
    doing: str,
    *,
    shows: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bars]:
    """Bars for the duration of a piece of work; they appear when it takes more than two seconds, and go with it.

    Without a terminal a line that stays, every fifteen seconds.

    Args:
        doing: what is done, in a word or two.
        shows: False for a process that another one speaks for.
        console: standard error unless given.
        clock: seconds.
    """
    shown = errors() if console is None else console
    if not shows or not is_terminal(shown.file):
        yield Bars(None, doing, _Lines(shown, clock) if shows else None)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), _Counts())
    with _LateProgress(*columns, console=shown, clock=clock) as bars:
        yield Bars(bars, doing)


def _named(stage: str) -> str:
    """A sweep by its first columns: it is called by all of them, which may be a dozen."""
    columns = stage.split(" and ")
    return stage if len(columns) <= NAMED + 1 else f"{', '.join(columns[:NAMED])} and more"


def _shown(text: str) -> str:
    return fitted(escaped(text), LONGEST, "...")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
