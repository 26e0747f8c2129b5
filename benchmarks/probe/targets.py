"""What the one-pass engine is expected to reach, and whether it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.probe.contenders import ONE_PASS, baseline
from benchmarks.probe.measure import Measured
from benchmarks.probe.workloads import FULL, LONG, SHORT, SMOL, TWO_BATCHES, VOCABULARY


@dataclasses.dataclass(frozen=True)
class Bounds:
    """For one workload.

    Attributes:
        speed_up: at least so many times as fast as the frozen two passes (for two batches: as the alpha trick).
        time: at most so many plain steps a batch.
        memory: at most so many times the plain step's peak.
    """

    speed_up: float
    time: float
    memory: float


TARGETS = {
    SHORT.name: Bounds(14, 0.45, 0.6),
    LONG.name: Bounds(28, 0.28, 0.4),
    VOCABULARY.name: Bounds(28, 0.20, 0.15),
    TWO_BATCHES.name: Bounds(20, 0.40, 0.6),
    FULL.name: Bounds(6, 0.8, 1.0),
    SMOL.name: Bounds(10, 0.5, 0.5),
}
GROWTH_EXPONENT = 1.05  # at most


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A target and what was measured for it.

    Attributes:
        subject: workload, or what grows.
        number: what the number is.
        bound: what it has to keep.
        at_least: whether the bound is a lower one.
        measured: None when it was not measured; ``detail`` may say why.
    """

    subject: str
    number: str
    bound: float
    at_least: bool
    measured: float | None
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        reached = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "reached" if reached else "MISSED"


def outcomes(measured: list[Measured]) -> list[Outcome]:
    """Three for every workload that has targets."""
    found = []
    for m in measured:
        bounds = TARGETS.get(m.workload.name)
        if bounds is None:
            continue
        per_batch = " a batch" if m.workload.batches == 2 else ""
        numbers: list[tuple[str, float, bool, Callable[[Measured], float | None]]] = [
            (f"{baseline(m.workload.batches)} / {ONE_PASS}, time", bounds.speed_up, True, _speed_up),
            (f"{ONE_PASS} / plain step, time{per_batch}", bounds.time, False, _time),
            (f"{ONE_PASS} / plain step, peak memory", bounds.memory, False, _memory),
        ]
        detail = f"WRONG: {m.wrong[ONE_PASS]}" if ONE_PASS in m.wrong else ""
        found += [
            Outcome(m.workload.name, number, bound, at_least, value(m), detail)
            for number, bound, at_least, value in numbers
        ]
    return found


def _speed_up(measured: Measured) -> float | None:
    found = measured.speed_up(ONE_PASS)
    return None if found is None else found.median


def _time(measured: Measured) -> float | None:
    found = measured.in_plain_steps(ONE_PASS)
    return None if found is None else found.median


def _memory(measured: Measured) -> float | None:
    return measured.memory_in_plain_steps(ONE_PASS)
