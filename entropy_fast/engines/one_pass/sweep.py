"""One sweep of a batch by capture: groups of units, each with one forward and one backward, halved where memory runs out."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from entropy_fast.capture import SignalRows
from entropy_fast.config import ProbeConfig
from entropy_fast.engines.one_pass.capture_pass import CapturePass
from entropy_fast.engines.one_pass.planner import CostModel, cut
from entropy_fast.errors import ProbeMemoryError
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts

__all__ = ["Found", "MicrobatchLimit", "SweepReport", "prompt_tokens", "sweep"]

Found = TypeVar("Found", bound=SignalRows)  # the recorder of a sweep


@dataclasses.dataclass
class MicrobatchLimit:
    """How much goes into one forward, lowered where memory runs out; one for all sweeps of a probe.

    Attributes:
        tokens: where microbatches are cut by tokens.
        prompts: where a number of prompts was asked for; None elsewhere.
    """

    tokens: int
    prompts: int | None

    @classmethod
    def of(cls, config: ProbeConfig, costs: CostModel) -> MicrobatchLimit:
        """As many tokens as products need for their full rate, if their activations fit the budget."""
        fitting = config.memory_bytes // max(1, costs.bytes_per_token)
        return cls(max(1, min(costs.full_rate_tokens, fitting)), config.prompts_per_microbatch)


@dataclasses.dataclass
class SweepReport:
    """What a sweep did.

    Attributes:
        microbatches: that were gone through.
        largest: tokens of the largest.
        halved: how often memory ran out and a microbatch was halved.
    """

    microbatches: int = 0
    largest: int = 0
    halved: int = 0


def sweep(
    components: ProbeComponents,
    capture: CapturePass,
    limit: MicrobatchLimit,
    rollouts: Rollouts,
    units: list[list[int]],
    recorder: Callable[[list[int]], Found],
    visit: Callable[[list[int], Found], None],
    *,
    labels: str,
    tables: str = "",
    stage: str = "",
    shared: bool = True,
    start_again: Callable[[], None] = lambda: None,
) -> SweepReport:
    """Go through a batch; ``visit`` sees what the backwards of a few complete units brought.

    Args:
        components: model and options.
        capture: what runs a microbatch.
        limit: of a microbatch; lowered in place where memory runs out.
        rollouts: the batch.
        units: prompts of every unit.
        recorder: makes what takes in the signals of the given units, which are successive.
        visit: called for each group of units, by their numbers, with that.
        labels: which of X and Y is wanted.
        tables: passes (X, Y) whose tables of sequences are written.
        stage: name for the progress report.
        shared: whether a prompt's tokens may run once; microbatches are cut accordingly.
        start_again: called when everything visited so far is void.

    Raises:
        ProbeMemoryError: there is not enough memory for a single prompt.
        ModelStateError: log-probs are random, or sequences interact.
    """
    written = {label: components.new_table(label, rollouts) for label in tables}
    report = SweepReport()
    # Compiled modules run as they were written: what is exchanged in them is not what was compiled.
    with components.probe_state(), torch.compiler.set_stance("force_eager"):
        capture.choose(rollouts)
        cutter = _Cutter(capture, limit, prompt_tokens(rollouts, shared=shared and capture.shares))
        waiting = cutter.groups(units)
        done = 0
        while waiting:
            numbers = waiting[0]
            prompts = [prompt for number in numbers for prompt in units[number]]
            unit_of = {prompt: place for place, number in enumerate(numbers) for prompt in units[number]}
            gradients = recorder(numbers)
            parts = cutter.parts(prompts)
            refused: set[str] = set()
            try:
                for part in parts:
                    rows = torch.cat([rollouts.rows_of_prompt(prompt) for prompt in part])
                    unit = [unit_of[int(prompt)] for prompt in rollouts.prompt_index[rows]]
                    refused = capture.run(rollouts, rows, unit, gradients, written, labels)
                    if refused:
                        break
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                # Nothing of this group was visited.
                message = (str(error) or type(error).__name__).splitlines()[0]
            else:
                if refused:
                    # From the start: what was visited lacks these parameters.
                    capture.leave_out(refused)
                    start_again()
                    waiting, done, report = cutter.groups(units), 0, SweepReport()
                    continue
                visit(numbers, gradients)
                report.microbatches += len(parts)
                report.largest = max(report.largest, *(cutter.size(part) for part in parts))
                done += len(prompts)
                del waiting[0]
                components.report(stage or labels, done, rollouts.n_prompts)
                continue
            del gradients
            _release()
            report.halved += 1
            if cutter.halve([prompts] if len(numbers) > 1 else parts):
                # Later groups would run out as well.
                first = numbers[0]
                waiting = [[first + place for place in group] for group in cutter.groups(units[first:])]
            else:
                raise ProbeMemoryError(
                    f"memory ran out with a single prompt of {cutter.size(part)} tokens in a forward: {message}",
                    fix="switch on gradient checkpointing, probe shorter responses or fewer per prompt; or lower memory_budget "
                    "if every unit's gradients are kept.",
                )
    return report


def prompt_tokens(rollouts: Rollouts, *, shared: bool) -> list[int]:
    """Tokens of every prompt's sequences, the prompt's own counted once where they are ``shared``."""
    attended = rollouts.attention_mask.sum(-1).cpu()
    answered = rollouts.response_lengths.cpu()
    counts = []
    for prompt in range(rollouts.n_prompts):
        rows = rollouts.rows_of_prompt(prompt)
        own = attended[rows] - answered[rows]
        counts.append(int((own.min() if shared else own.sum()) + answered[rows].sum()))
    return counts


class _Cutter:
    """Groups of units and parts of groups: as many prompts in a forward as were asked for, else by tokens."""

    def __init__(self, capture: CapturePass, limit: MicrobatchLimit, tokens: list[int]) -> None:
        self._capture, self._limit, self._tokens = capture, limit, tokens

    def size(self, prompts: Sequence[int]) -> int:
        """Tokens of the given prompts."""
        return sum(self._tokens[prompt] for prompt in prompts)

    def groups(self, units: list[list[int]]) -> list[list[int]]:
        """Unit numbers of every group."""
        if self._by_tokens:
            return cut([self.size(unit) for unit in units], self._limit.tokens)
        groups: list[list[int]] = []
        held = 0
        for number, unit in enumerate(units):
            if groups and held + len(unit) <= (self._limit.prompts or 1):
                groups[-1].append(number)
                held += len(unit)
            else:
                groups.append([number])
                held = len(unit)
        return groups

    def parts(self, prompts: list[int]) -> list[list[int]]:
        """Prompts of every forward."""
        if self._by_tokens:
            return [[prompts[n] for n in part] for part in cut([self._tokens[p] for p in prompts], self._limit.tokens)]
        count = self._limit.prompts or 1
        return [prompts[start : start + count] for start in range(0, len(prompts), count)]

    def halve(self, parts: list[list[int]]) -> bool:
        """Make parts half as large from now on; False when they were single prompts."""
        most = max(len(part) for part in parts)
        if most == 1:
            return False
        self._limit.tokens = max(1, max(self.size(part) for part in parts) // 2)
        if self._limit.prompts is not None:
            self._limit.prompts = most // 2
        return True

    @property
    def _by_tokens(self) -> bool:
        return self._limit.prompts is None and self._capture.packs


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    # On the CPU torch raises a plain RuntimeError, whose words depend on the platform but for the allocator's name.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
