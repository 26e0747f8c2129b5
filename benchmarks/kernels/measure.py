"""One spec: check everything against float64, then time what is right, in turns."""

from __future__ import annotations

import dataclasses
import gc

from benchmarks.kernels import check, memory
from benchmarks.kernels.copy_limit import COPY, Copy
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.problems import build
from benchmarks.kernels.specs import FOLD, LINEAR, Spec
from benchmarks.kernels.timing import Spread, interleaved, ratio, watch_others
from entropy_fast.errors import BackendUnavailableError


@dataclasses.dataclass
class Measured:
    """What came out for one spec.

    Attributes:
        spec: what was measured.
        kinds: of every contender that was tried, in order.
        notes: what each of them does.
        times: seconds per round of each that is right, and of the limits.
        wrong: complaint about each that is not.
        missing: reason why others could not run.
        extra_memory: peak bytes beyond the inputs during one call.
        moved_bytes: on paper.
        operations: on paper.
        limited_by: name of the limit.
        copied_bytes: what one call of the copy moves.
        busy_elsewhere: cores that other processes kept busy during the timed rounds; None where that is unknown.
    """

    spec: Spec
    kinds: dict[str, str]
    notes: dict[str, str]
    times: dict[str, list[float]]
    wrong: dict[str, str]
    missing: dict[str, str]
    extra_memory: dict[str, int]
    moved_bytes: int
    operations: int
    limited_by: str
    copied_bytes: int
    busy_elsewhere: float | None = None

    def backends(self) -> list[str]:
        return [name for name, kind in self.kinds.items() if kind == "backend"]

    def ratio(self, numerator: str, denominator: str) -> Spread | None:
        """Time of one over time of the other; None unless both were timed."""
        if numerator not in self.times or denominator not in self.times:
            return None
        return ratio(self.times[numerator], self.times[denominator])

    def bandwidth(self, name: str) -> float:
        """Bytes per second, by the bytes on paper."""
        moved = self.copied_bytes if name == COPY else self.moved_bytes
        return moved / Spread.of(self.times[name]).median

    def rate(self, name: str) -> float | None:
        """Operations per second, by the operations on paper; None for limits that do something else."""
        if (self.kinds[name] == "limit" and self.spec.op != LINEAR) or name == COPY:
            return None
        return self.operations / Spread.of(self.times[name]).median

    def of_copy(self, name: str) -> float | None:
        """Bandwidth as a share of the copy's, measured in the same rounds."""
        slowdown = self.ratio(COPY, name)
        if slowdown is None or name == COPY:
            return None
        return slowdown.median * self.moved_bytes / self.copied_bytes

    def of_limit(self, name: str) -> float | None:
        """Speed as a share of what limits this op."""
        if self.spec.op == FOLD:
            return self.of_copy(name)
        slowdown = self.ratio(self.limited_by, name)
        return None if slowdown is None or name in (self.limited_by, COPY) else slowdown.median


def measure(problem: Problem, spec: Spec, device: str, rounds: int, copy: Copy) -> Measured:
    """Check, then time. Contenders that are wrong or cannot run get no time."""
    wrong, missing, right = {}, dict(problem.missing), []
    expected = problem.expected()
    for contender in problem.contenders:
        if contender.kind != "limit":
            problem.reset()
            try:
                complaint = check.complaint(contender, spec, expected)
            except (BackendUnavailableError, NotImplementedError) as error:
                missing[contender.name] = str(error) or "not implemented"
                continue
            except Exception as error:
                # One that crashes, out of memory for instance, leaves the others to be measured.
                complaint = f"{type(error).__name__}: {error}".splitlines()[0]
            if complaint:
                wrong[contender.name] = complaint
                continue
        right.append(contender)
    del expected
    gc.collect()
    if spec.timed:
        right.append(copy.contender())
        problem.reset()
        with watch_others() as others:
            times = interleaved({c.name: c.run for c in right}, device, rounds, between=copy.run)
        busy = others.cores
    else:
        times, busy = {}, None
    return Measured(
        spec,
        {c.name: c.kind for c in right},
        {c.name: " ".join(c.note.split()) for c in right},
        times,
        wrong,
        missing,
        {},
        problem.moved_bytes,
        problem.operations,
        problem.limited_by,
        copy.moved_bytes,
        busy,
    )


def measure_spec(spec: Spec, device: str, rounds: int, copy: Copy, *, compiles: bool, with_memory: bool) -> Measured:
    """:func:`measure`, and the memory of each contender in a process of its own."""
    measured = measure(build(spec, device, compiles), spec, device, rounds, copy)
    gc.collect()
    if with_memory and spec.memory:
        for name, kind in measured.kinds.items():
            if kind != "limit":
                measured.extra_memory[name] = memory.in_own_process(spec, name, device)
    return measured
