"""Damaged input, at random from a seed, and what comes of it: it reads, or raises an error of this package."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from entropy_fast.errors import EntropyFastError

HANGS_AFTER = 20  # seconds for one case; they take milliseconds
JUNK: list[Any] = [
    None, True, -1, 0, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", "\ud800", "\x1b[2J", [], [[]], {}, {"a": 1},
    [None], [1, "x"], [0.5], "1" * 50,
]  # fmt: skip
TOKENS = [
    b"null", b"NaN", b"1e999", b"-1", b"9" * 30, b"[" * 2000, b'"', b"\\ud800", b"\xff", b"\x00", b"\n", b"}{", b",", b"{}",
    b"true",
]  # fmt: skip


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(call: Callable[[], object], what: object) -> bool:
    """Whether it raises an error of ours. Any other is a failure of the test, with the case that led to it."""
    try:
        with time_limit():
            call()
    except EntropyFastError as error:
        said = error.problem
    except Exception as error:
        raise AssertionError(f"a foreign {type(error).__name__} ({error}) for {what!r:.2000}") from error
    else:
        return False
    assert said.isprintable(), f"an error that cannot be printed for {what!r:.2000}"
    return True


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.randint(1, 12)
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = chance.choice(TOKENS)
        elif kind == 3:
            data[at : at + length] = chance.randbytes(length)
        else:
            data[at:at] = data[chance.randrange(len(data) + 1) :][:length]
        if not data:
            return b""
    return bytes(data)


def damaged_value(value: Any, chance: random.Random, junk: list[Any]) -> Any:
    """A row or a list with something in it replaced, dropped or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        change = chance.randrange(4)
        if change == 0:
            del value[key]
        elif change == 1:
            value[chance.choice([key + "x", "reward", "prompt", "input_ids", "\x1b"])] = value[key]
        else:
            value[key] = damaged_value(value[key], chance, junk)
        return value
    if isinstance(value, list) and value and chance.random() < 0.6:
        at = chance.randrange(len(value))
        value[at] = damaged_value(value[at], chance, junk)
        return value
    chosen = chance.choice(junk)
    # What is put in may be changed later, and the next case is to begin with the same junk.
    return copy.deepcopy(chosen) if isinstance(chosen, (list, dict)) else chosen
