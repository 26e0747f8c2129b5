"""Times of several actions, taken in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

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


def interleaved(
    actions: dict[str, Callable[[], object]], device: str, rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each action in each round: A B C, A B C, ..., after ``warm_up`` rounds that do not count."""
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(warm_up + rounds):
        for name, action in actions.items():
            seconds = clock(action)
            if number >= warm_up:
                times[name].append(seconds)
    return times
