"""What the kernels are expected to reach, and whether they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.kernels.copy_limit import COPY
from benchmarks.kernels.measure import Measured
from benchmarks.kernels.problem import BACKENDS
from benchmarks.kernels.specs import (
    CUDA_TARGET_SPECS,
    FOLD_FP32,
    LINEAR_BF16,
    LINEAR_FP32,
    LINEAR_MANY_ROWS,
    TOKEN_FP32,
    Spec,
)

H100_BYTES_PER_SECOND = 3.35e12
H100_BF16_PER_SECOND = 989e12


@dataclasses.dataclass(frozen=True)
class Target:
    """One number and the bound it has to keep.

    Attributes:
        spec: what it is about.
        text: what the number is.
        value: the number for one backend; None when it was not measured.
        bound: the bound.
        at_least: whether the bound is a lower one.
        unit: ``x`` or ``%``.
    """

    spec: Spec
    text: str
    value: Callable[[Measured, str], float | None]
    bound: float
    at_least: bool
    unit: str = "x"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A target and what was measured for it."""

    target: Target
    backend: str
    measured: float | None
    detail: str

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        reached = self.measured >= self.target.bound if self.target.at_least else self.measured <= self.target.bound
        return "reached" if reached else "MISSED"


def _faster_than(rival: str) -> Callable[[Measured, str], float | None]:
    def value(measured: Measured, backend: str) -> float | None:
        spread = measured.ratio(rival, backend)
        return None if spread is None else spread.median

    return value


def _time_over(limit: str) -> Callable[[Measured, str], float | None]:
    def value(measured: Measured, backend: str) -> float | None:
        spread = measured.ratio(backend, limit)
        return None if spread is None else spread.median

    return value


def _share(of: Callable[[Measured, str], float | None]) -> Callable[[Measured, str], float | None]:
    def value(measured: Measured, backend: str) -> float | None:
        share = of(measured, backend)
        return None if share is None else 100 * share

    return value


def _memory_of_eager(measured: Measured, backend: str) -> float | None:
    memory = measured.extra_memory
    if backend not in memory or "eager" not in memory:
        return None
    return memory["eager"] / max(memory[backend], 1)


CPU_TARGETS = (
    Target(TOKEN_FP32, "eager / op, time", _faster_than("eager"), 18, True),
    Target(TOKEN_FP32, "compiled / op, time", _faster_than("compiled"), 4.3, True),
    Target(TOKEN_FP32, "speed of z.sum()", _share(Measured.of_limit), 70, True, "%"),
    Target(LINEAR_FP32, "op / two bare GEMMs, time", _time_over("GEMMs"), 1.12, False),
    Target(LINEAR_BF16, "eager forward and backward / op, time", _faster_than("eager"), 2.6, True),
    Target(LINEAR_BF16, "op / two bare GEMMs, time", _time_over("GEMMs"), 1.05, False),
    *(Target(spec, "eager / op, extra memory", _memory_of_eager, 20, True) for spec in LINEAR_MANY_ROWS),
    Target(FOLD_FP32, "eager / op, time", _faster_than("eager"), 8, True),
    Target(FOLD_FP32, "compiled / op, time", _faster_than("compiled"), 1.6, True),
    Target(FOLD_FP32, "28 B/element at the speed of copy", _share(Measured.of_copy), 105, True, "%"),
)


def _bandwidth(measured: Measured, backend: str) -> float | None:
    return 100 * measured.bandwidth(backend) / H100_BYTES_PER_SECOND if backend in measured.times else None


def _rate(measured: Measured, backend: str) -> float | None:
    if backend not in measured.times:
        return None
    return 100 * (measured.rate(backend) or 0.0) / H100_BF16_PER_SECOND


CUDA_TARGETS = (
    *(Target(s, "of 3.35 TB/s (H100)", _bandwidth, 85, True, "%") for s in CUDA_TARGET_SPECS[:2]),
    Target(CUDA_TARGET_SPECS[2], "of 989 TFLOP/s (H100, bf16)", _rate, 80, True, "%"),
    Target(CUDA_TARGET_SPECS[3], "of 3.35 TB/s (H100)", _bandwidth, 85, True, "%"),
)


def outcomes(measured: list[Measured], device: str) -> list[Outcome]:
    """One per target whose spec was measured, and backend."""
    by_spec = {m.spec: m for m in measured}
    found = []
    for target in CUDA_TARGETS if device == "cuda" else CPU_TARGETS:
        m = by_spec.get(target.spec)
        if m is None:
            continue
        # A wrong backend keeps its line.
        backends = [*m.backends(), *(name for name in m.wrong if name in BACKENDS[device])]
        found += [Outcome(target, backend, target.value(m, backend), _detail(m, backend)) for backend in backends]
    return found


def _detail(measured: Measured, backend: str) -> str:
    if backend in measured.wrong:
        return f"WRONG: {measured.wrong[backend]}"
    if measured.limited_by == COPY:
        return f"copy {measured.bandwidth(COPY) / 1e9:.1f} GB/s" if COPY in measured.times else ""
    return ""
