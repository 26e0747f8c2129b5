"""Times of several actions, taken in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of times taken in the same round, so that a machine that slows down for a while slows both down."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def _cpu_seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _cuda_seconds(action: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclasses.dataclass
class Elsewhere:
    """What other processes took from this machine meanwhile.

    Attributes:
        cores: how many cores they kept busy on average; None where /proc/stat does not say.
    """

    cores: float | None = None


def _busy_seconds() -> float:
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


@contextlib.contextmanager
def watch_others() -> Iterator[Elsewhere]:
    """Measures, while the body runs, how busy other processes are: times taken next to them mean little."""
    found = Elsewhere()
    try:
        busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    except (OSError, ValueError):
        yield found
        return
    yield found
    elapsed = time.perf_counter() - start
    found.cores = max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own)) / elapsed


def interleaved(
    actions: dict[str, Callable[[], object]],
    device: str,
    rounds: int,
    between: Callable[[], object] = lambda: None,
    warm_up: int = 2,
    fewer: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each action in each round: A B C, A B C, ..., after ``warm_up`` rounds that do not count.

    Actions in ``fewer`` sit out all rounds but the first so many: they take too long to be in every one.
    ``between`` runs before each action, outside its time: something that leaves caches and threads in one state whatever ran
    before, or else an action would find the data of its predecessor.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    fewer = fewer or {}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(warm_up + rounds):
        for name, action in actions.items():
            if number >= warm_up + fewer.get(name, rounds):
                continue
            between()
            seconds = clock(action)
            if number >= warm_up:
                times[name].append(seconds)
    return times
