"""One workload: check every contender against the two-pass engine, time what is right in turns, then weigh it."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels.timing import Spread, interleaved, ratio, watch_others
from benchmarks.probe import memory
from benchmarks.probe.check import complaint, expected_of
from benchmarks.probe.contenders import CONTENDERS, PLAIN, Contender, baseline
from benchmarks.probe.setting import Setting, build
from benchmarks.probe.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much measuring.

    Attributes:
        repeat: rounds of the plain step and the one-pass engine.
        slow_repeat: rounds of everything else.
        memory: whether memory is measured.
        contenders: names of those that take part; None for all.
    """

    repeat: int = 5
    slow_repeat: int = 3
    memory: bool = True
    contenders: tuple[str, ...] | None = None

    def rounds(self, contender: Contender) -> int:
        return min(self.repeat, self.slow_repeat) if contender.slow else self.repeat


@dataclasses.dataclass
class Measured:
    """What came out for one workload.

    Attributes:
        workload: what was measured.
        notes: what each contender does.
        rounds: how often each was timed.
        times: seconds of each that is right, round by round.
        peaks: bytes beyond model and optimizer at the peak of one call.
        wrong: complaint about each that is not right.
        missing: reason why others could not run.
        tokens: real tokens: of prompts (each counted once) and of responses, in the update batch.
        busy_elsewhere: cores that other processes kept busy during the timed rounds; None where that is unknown.
    """

    workload: Workload
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    rounds: dict[str, int] = dataclasses.field(default_factory=dict)
    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    tokens: tuple[int, int] = (0, 0)
    busy_elsewhere: float | None = None

    def in_plain_steps(self, name: str) -> Spread | None:
        """Time per batch over the plain step's of one batch, in the rounds that both were in."""
        batches = 1 if name == PLAIN else self.workload.batches
        found = self._ratio(name, PLAIN)
        return None if found is None else Spread(*(v / batches for v in dataclasses.astuple(found)))

    def speed_up(self, name: str) -> Spread | None:
        """How many times as long the frozen two passes (for two batches: the alpha trick) take."""
        # The plain step does something else, and of one batch alone.
        return None if name == PLAIN else self._ratio(baseline(self.workload.batches), name)

    def memory_in_plain_steps(self, name: str) -> float | None:
        if name not in self.peaks or PLAIN not in self.peaks:
            return None
        return self.peaks[name] / self.peaks[PLAIN]

    def _ratio(self, numerator: str, denominator: str) -> Spread | None:
        a, b = self.times.get(numerator), self.times.get(denominator)
        if not a or not b:
            return None
        both = min(len(a), len(b))
        return ratio(a[:both], b[:both])


def _right(
    setting: Setting, rollouts_file: Path | None, tried: Sequence[Contender], measured: Measured
) -> list[Contender]:
    """Those whose numbers are right; the others are noted. Everything has run once afterwards."""
    expected = expected_of(setting, rollouts_file)
    right = []
    for contender in tried:
        reason = contender.why_not()
        if reason is not None:
            measured.missing[contender.name] = reason
            continue
        try:
            found = complaint(contender.run(setting), expected)
        except Exception as error:
            # One that crashes leaves the others to be measured.
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            (measured.missing if contender.kind == "rival" else measured.wrong)[contender.name] = said
            continue
        gc.collect()
        if found:
            measured.wrong[contender.name] = found
        else:
            right.append(contender)
    return right


def measure(
    workload: Workload, effort: Effort, rollouts_file: Path | None = None, among: Sequence[Contender] = CONTENDERS
) -> Measured:
    """Check, time, weigh."""
    setting = build(workload, rollouts_file)
    chosen = [c for c in among if workload.batches in c.batches]
    chosen = [c for c in chosen if effort.contenders is None or c.name in effort.contenders]
    padded = setting.padded
    prompt_tokens = int(padded.attention[:, 0, : padded.prompt_width].sum())
    measured = Measured(workload, tokens=(prompt_tokens, int(padded.scored.sum())))
    right = _right(setting, rollouts_file, chosen, measured)
    measured.notes = {c.name: c.note for c in right}
    measured.rounds = {c.name: effort.rounds(c) for c in right}

    actions = {c.name: functools.partial(c.run, setting) for c in right}
    with watch_others() as others:
        # Checking was the round that does not count.
        measured.times = interleaved(
            actions, "cpu", effort.repeat, between=gc.collect, warm_up=0, fewer=measured.rounds
        )
    measured.busy_elsewhere = others.cores
    del setting, actions
    gc.collect()
    if effort.memory:
        for contender in right:
            measured.peaks[contender.name] = memory.in_own_process(workload, contender.name, rollouts_file)
    return measured
