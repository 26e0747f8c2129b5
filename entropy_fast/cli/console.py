"""Consoles, streams and progress bars shared by the commands."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from entropy_fast.errors import EntropyFastWarning

__all__ = ["errors", "lenient_streams", "output", "progress", "quiet_libraries"]


def output() -> Console:
    """Standard output; model text goes through `rich.text.Text`, never through markup."""
    return Console(markup=False, highlight=False)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, markup=False, highlight=False)


class _Lenient:
    """A text stream that drops what cannot be written, and remembers the first failure.

    What a command prints comes after its work: a pipe whose reader has gone, a full disk, or a character that the terminal's
    encoding lacks must not cost the work, or end in a traceback.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failure: OSError | None = None
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self.failure is not None or self.stream.closed:
            return
        try:
            action()
        except OSError as error:
            self.failure = error
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # What is still buffered is written once more when Python ends; let that go nowhere too.
                number = self.stream.fileno()
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


@contextlib.contextmanager
def lenient_streams() -> Iterator[Callable[[], OSError | None]]:
    """Standard output and error that cannot fail; yields what standard output failed with, None where it did not.

    A stream that the process was started without is replaced by one that leads nowhere, its number included: the next file
    to be opened would otherwise become it, and receive what libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        out, err = (
            _Lenient(stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream)
            for stream in before
        )
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield lambda: out.failure
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage on standard error; yields the callback the probe reports to."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors(), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)
            if done >= total:
                # The stage may come again (sampling before every step): a finished bar is taken down.
                bars.remove_task(tasks.pop(stage))

        yield report


def quiet_libraries() -> None:
    """Turn off the libraries' bars and info lines, and our own warnings, which the result repeats.

    To be called before anything heavy is imported: some of it is said during the import.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # What it warns of, missing weights, is an error here.
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", EntropyFastWarning)
