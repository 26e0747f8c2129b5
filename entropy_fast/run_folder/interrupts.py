"""Signals that wait until a short piece of work is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["ENDING", "signals_wait"]

# What asks a process to end: Ctrl-C, `kill`, and a terminal that goes away.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Hold back the signals that end a process, and let them act when the block is done.

    Python runs signal handlers in the main thread alone; in another one there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        for number in ENDING:
            signal.signal(number, keep)
        yield
    finally:
        _restore(before)
        for received_number in received:
            signal.raise_signal(received_number)


def _restore(before: dict[signal.Signals, Any]) -> None:
    """Every handler back, also when a signal that has its own again acts at once."""
    try:
        while before:
            number, handler = next(iter(before.items()))
            # None: installed by something other than Python, which gave no way to name it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            del before[number]
    except BaseException:
        _restore(before)
        raise
