"""How the one-pass engine's time grows with each size of the problem, over a decade."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from benchmarks.kernels.timing import interleaved
from benchmarks.probe.contenders import ONE_PASS, one_pass_result
from benchmarks.probe.setting import build
from benchmarks.probe.targets import GROWTH_EXPONENT, Outcome
from benchmarks.probe.workloads import SHORT, Workload

LENGTH = "response_length"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One size that grows while the others stay.

    Attributes:
        field: of `Workload`.
        label: in words.
        sizes: ascending.
        base: the workload whose field is replaced. Lengths are all alike: drawn ones would make a batch of few prompts longer
            or shorter than its size says.
    """

    field: str
    label: str
    sizes: tuple[int, ...]
    base: Workload

    def workload(self, size: int) -> Workload:
        return dataclasses.replace(self.base, **{self.field: size})


_BASE = dataclasses.replace(SHORT, name="growth", ragged=False)
AXES = (
    Axis("prompts", "prompts", (8, 16, 32, 48, 80), _BASE),
    Axis(LENGTH, "response length", (16, 32, 64, 112, 160), _BASE),
    Axis("vocabulary", "vocabulary", (4096, 8192, 16384, 28672, 40960), _BASE),
    Axis("rank", "LoRA rank", (4, 8, 16, 24, 40), _BASE),
)
_SMALL = _BASE.small()
QUICK_AXES = (
    Axis("prompts", "prompts", (2, 4, 8), _SMALL),
    Axis(LENGTH, "response length", (4, 8, 16), _SMALL),
)


@dataclasses.dataclass(frozen=True)
class Growth:
    """Times along one axis.

    Attributes:
        axis: what grew.
        seconds: median at each size.
        exponent: least-squares slope of log time on log size.
        quadratic_share: for lengths: the share of time at the largest size that grows as its square, attention, from a fit of
            t = t₀ + a L + b L² with no negative term; None otherwise.
        exponent_of_the_rest: for lengths: the slope of what is left without that term; of all where that leaves nothing.
    """

    axis: Axis
    seconds: list[float]
    exponent: float
    quadratic_share: float | None = None
    exponent_of_the_rest: float | None = None


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log time on log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def quadratic_part(sizes: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """b L² at each size, from the fit of t₀ + a L + b L² (each ≥ 0) that is best in relative error."""
    L, t = np.asarray(sizes, dtype=float), np.asarray(seconds)
    columns = np.stack([np.ones_like(L), L, L**2], axis=1)
    # Columns of about the same size, for the solver's sake.
    scale = columns.max(0)
    coefficients, _ = nnls(columns / scale / t[:, None], np.ones_like(t))
    return list(coefficients[2] / scale[2] * L**2)


def fitted(axis: Axis, seconds: list[float]) -> Growth:
    """Exponents of times along an axis."""
    slope = exponent(axis.sizes, seconds)
    if axis.field != LENGTH:
        return Growth(axis, seconds, slope)
    attention = quadratic_part(axis.sizes, seconds)
    rest = [t - q for t, q in zip(seconds, attention, strict=True)]
    # Time that grows faster still makes that term larger than some of the times; then there is no rest to speak of.
    of_rest = exponent(axis.sizes, rest) if min(rest) > 0 else slope
    return Growth(axis, seconds, slope, attention[-1] / seconds[-1], of_rest)


def measure_growth(axis: Axis, repeat: int) -> Growth:
    """Time every size in turns, ``repeat`` rounds after one that does not count."""
    settings = {str(size): build(axis.workload(size)) for size in axis.sizes}
    actions = {size: functools.partial(one_pass_result, setting) for size, setting in settings.items()}
    times = interleaved(actions, "cpu", repeat, between=gc.collect, warm_up=1)
    return fitted(axis, [statistics.median(times[str(size)]) for size in axis.sizes])


def outcomes(grown: list[Growth]) -> list[Outcome]:
    """One target for each axis; for lengths it is about what is left without attention."""
    found = []
    for growth in grown:
        slope, number, detail = growth.exponent, f"{ONE_PASS}, exponent of time", ""
        if growth.quadratic_share is not None:
            assert growth.exponent_of_the_rest is not None
            slope, number = growth.exponent_of_the_rest, f"{number} without attention"
            detail = f"with attention {growth.exponent:.2f}"
        found.append(Outcome(growth.axis.label, number, GROWTH_EXPONENT, False, slope, detail))
    return found
