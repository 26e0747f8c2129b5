"""Where the time of one call of the one-pass engine goes, and how near it is to what the machine's matrix products do."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics

from benchmarks.kernels.timing import interleaved
from benchmarks.probe.contenders import one_pass_result
from benchmarks.probe.operations import Operations, matrix_product_rate, necessary
from benchmarks.probe.setting import build
from benchmarks.probe.stages import StageClock
from benchmarks.probe.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Profile:
    """One workload.

    Attributes:
        workload: what was profiled.
        seconds: median wall time of a call without the clock.
        profiled_seconds: wall time of the fastest call under the clock, which slows Python down.
        stages: seconds by stage, of that call.
        operations: on paper.
        gemm_rate: float32 operations per second of a large product of square matrices, best of before and after.
    """

    workload: Workload
    seconds: float
    profiled_seconds: float
    stages: dict[str, float]
    operations: Operations
    gemm_rate: float

    @property
    def of_gemm_rate(self) -> float:
        """The share of that rate at which the necessary operations were done."""
        return self.operations.total / self.seconds / self.gemm_rate


def measure_profile(workload: Workload, repeat: int, gemm_size: int = 2048) -> Profile:
    """Time the call, then take it apart."""
    setting = build(workload)
    call = functools.partial(one_pass_result, setting)
    before = matrix_product_rate(gemm_size)
    times = interleaved({"one_pass": call}, "cpu", repeat, between=gc.collect, warm_up=1)["one_pass"]
    clocks = [StageClock() for _ in range(repeat)]
    # The fastest: one call alone may have met something else that ran on the machine.
    profiled, clock = min(((clock.run(call), clock) for clock in clocks), key=lambda found: found[0])
    rate = max(before, matrix_product_rate(gemm_size))
    return Profile(workload, statistics.median(times), profiled, clock.seconds, necessary(setting), rate)
