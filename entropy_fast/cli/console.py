"""Consoles and streams shared by the commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from rich.console import Console

__all__ = ["errors", "is_terminal", "lenient_streams", "output"]


def output() -> Console:
    """Standard output; model text goes through `rich.text.Text`, never through markup."""
    return _console(sys.stdout)


def errors() -> Console:
    """Standard error."""
    return _console(sys.stderr)


def is_terminal(stream: Any) -> bool:
    """Whether a stream leads to a terminal that can move its cursor; False for one that is closed."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except (AttributeError, ValueError, OSError):
        return False


def _console(stream: Any) -> Console:
    """Colours where it is a terminal, or ``FORCE_COLOR`` is set to anything; none, nor bold, where ``NO_COLOR`` is."""
    wanted = is_terminal(stream) or bool(os.environ.get("FORCE_COLOR"))
    coloured = wanted and not os.environ.get("NO_COLOR")
    return Console(
        file=stream,
        force_terminal=wanted,
        color_system="auto" if coloured else None,
        markup=False,
        highlight=False,
    )


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
