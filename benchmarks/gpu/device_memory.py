"""Peak memory of a call, on whichever device it works."""

from __future__ import annotations

import gc
from collections.abc import Callable

from benchmarks.kernels.memory import peak_of_cuda, peak_of_process
from benchmarks.kernels.problem import Contender, Results


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Memory in use at the peak of one call beyond what was in use before. The call has run before."""
    if device != "cuda":
        return peak_of_process(call)
    kept: list[object] = []

    def run() -> Results:
        kept.append(call())
        return {}

    gc.collect()
    return peak_of_cuda(Contender("call", "backend", run))
