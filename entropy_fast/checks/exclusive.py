"""One probe at a time in a process, and none that an interrupt leaves half undone.

A probe exchanges parts of a model, and settings of torch that the whole process shares, for as long as it runs. A second one in
another thread would see them, and so would whatever runs after a probe that was interrupted while it put them back.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from entropy_fast.errors import ModelStateError

__all__ = ["one_probe_at_a_time", "raise_if_interrupted", "undivided"]

_running = threading.Lock()
_owner: int | None = None
_interrupts = 0
# So many interrupts while the first waits for a safe moment are taken to mean: at once.
_INSISTING = 3
# How long who waits for another probe is deaf to interrupts, seconds.
_LOOK_AROUND = 0.2


@contextlib.contextmanager
def one_probe_at_a_time(*, wait: bool) -> Iterator[None]:
    """For the length of a probe: others wait for its end, and so does Ctrl-C for the next safe moment.

    Args:
        wait: whether to wait for a probe that runs in another thread; otherwise that is an error.

    Raises:
        ModelStateError: a probe is running, in this thread (from a callback of its own) or, without ``wait``, in another.
        KeyboardInterrupt: at a safe moment (`raise_if_interrupted`), or at the end.
    """
    global _owner
    if _owner == threading.get_ident():
        raise ModelStateError(
            "a probe was started from within a probe (from its on_progress callback?).",
            fix="start it after the first has returned.",
        )
    # Around all of it: an interrupt between two lines of putting back would leave the rest of the process waiting for ever.
    with _interrupts_deferred():
        _acquire(wait=wait)
        try:
            _owner = threading.get_ident()
            yield
        finally:
            _owner = None
            _running.release()


def _acquire(*, wait: bool) -> None:
    while not _running.acquire(timeout=_LOOK_AROUND if wait else 0):
        if not wait:
            raise ModelStateError(
                "another probe is running in this process, and they cannot run at once: each exchanges parts of its model.",
                fix="wait for it (when_busy='wait'), or probe in a process of its own.",
            )
        if _interrupts and threading.current_thread() is threading.main_thread():
            _pass_on(None)


def raise_if_interrupted() -> None:
    """Let an interrupt through that came since the probe began; called where nothing is half done.

    Raises:
        KeyboardInterrupt: one came (or whatever the process's own handler raises).
    """
    if _interrupts and _owner == threading.get_ident() and threading.current_thread() is threading.main_thread():
        _pass_on(None)


_before: Callable[[int, FrameType | None], object] | None = None


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """SIGINT is noted, and passed on to the handler of before at a safe moment, or at the end."""
    global _before, _interrupts
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        # Python gives interrupts to the main thread alone; ignored ones and those of foreign handlers stay as they are.
        yield
        return
    _before, _interrupts = before, 0
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if _interrupts:
            _pass_on(None)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Around a few lines outside of a probe that have to happen together: an interrupt is passed on after them."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(signal.SIGINT, came[-1])


def _note(number: int, frame: FrameType | None) -> None:
    global _interrupts
    _interrupts += 1
    if _interrupts >= _INSISTING:
        _pass_on(frame)


def _pass_on(frame: FrameType | None) -> None:
    global _interrupts
    _interrupts = 0
    assert _before is not None
    _before(signal.SIGINT, frame)
