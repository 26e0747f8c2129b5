"""Consoles and progress bars shared by the commands."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from entropy_fast.errors import EntropyFastWarning

__all__ = ["errors", "output", "progress", "quiet_libraries"]


def output() -> Console:
    """Standard output; model text goes through `rich.text.Text`, never through markup."""
    return Console(markup=False, highlight=False)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, markup=False, highlight=False)


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
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", EntropyFastWarning)
