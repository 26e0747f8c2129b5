"""One sweep of a batch by capture: groups of units, each with one forward and its backwards, halved where memory runs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from entropy_fast.capture import RowRecorder
from entropy_fast.checks.memory import out_of_memory, release_memory
from entropy_fast.columns import Columns, SequenceTable, TokenScores
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.agreement import fingerprint
from entropy_fast.engines.one_pass.course import Course, MicrobatchLimit, SweepReport
from entropy_fast.engines.one_pass.cutting import cut
from entropy_fast.engines.one_pass.runner import Runner
from entropy_fast.errors import ProbeMemoryError, ResumeError
from entropy_fast.resuming import Held, KeptSweep, Tables
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways import Microbatch

__all__ = [
    "Found",
    "SweepRequest",
    "chosen",
    "prompt_tokens",
    "runs_whole",
    "score_batch",
    "scoring_of",
    "sweep",
]

Found = TypeVar("Found", bound=RowRecorder)  # the recorder of a sweep


@dataclasses.dataclass(frozen=True)
class SweepRequest:
    """What is gone through, and what for.

    Attributes:
        rollouts: the batch.
        units: prompts of every unit that is gone through.
        columns: whose gradients are wanted.
        stage: name for the progress report.
        table: where what is learned of sequences is written; None for nowhere.
        whole_sequences: whether a prompt's tokens must not run once for its responses; microbatches are cut accordingly.
    """

    rollouts: Rollouts
    units: list[list[int]]
    columns: Columns
    stage: str
    table: SequenceTable | None = None
    whole_sequences: bool = False

    @property
    def named(self) -> str:
        """The same text wherever the same is gone through for the same."""
        asked = self.rollouts, self.units, self.columns.members, self.whole_sequences, self.table is None
        return f"{self.stage}: {fingerprint(asked)}"


def sweep(
    context: ProbeContext,
    runner: Runner,
    limit: MicrobatchLimit,
    request: SweepRequest,
    recorder: Callable[[list[int]], Found],
    visit: Callable[[list[int], Found], None],
    held: Held,
) -> SweepReport:
    """Go through a batch; ``visit`` sees what the backwards of a few complete units brought.

    Args:
        context: of the probe.
        runner: what runs a microbatch.
        limit: of a microbatch; lowered in place where memory runs out.
        request: what is gone through.
        recorder: makes what takes in the signals of the given units, which are successive.
        visit: called for each group of units, by their numbers, with that.
        held: whatever ``visit`` adds up, empty: it is emptied again when everything visited so far is void, and filled where
            a process before this one had gone through a part.

    Returns:
        What was done. Where gradients have gone to other ranks that are void by now, it is broken off, and says so.

    Raises:
        ProbeMemoryError: there is not enough memory for a single prompt.
        ModelStateError: log-probs are random, or sequences interact.
        ResumeError: the checkpoint is of another sweep, or the model goes another way than it did then.
    """
    rollouts, units = request.rollouts, request.units
    if request.table is not None:
        known = {str(place): own for place, own in enumerate(request.table.known)}
        held = held.and_also("table", Tables(known, overwritten=True))
    total = sum(len(unit) for unit in units)
    # Compiled modules run as they were written: what is exchanged in them is not what was compiled.
    with context.probe_state(), torch.compiler.set_stance("force_eager"):
        runner.choose(rollouts)
        kept = context.keeper.sweep(lambda: request.named, held)
        course, cutter = _begin(context, runner, limit, request, kept)
        while course.waiting:
            numbers = course.waiting[0]
            prompts = [prompt for number in numbers for prompt in units[number]]
            recorded, parts = recorder(numbers), cutter.parts(prompts)
            refused, message = _run_parts(runner, request, numbers, parts, recorded)
            if message is not None:
                # Nothing of this group was visited.
                del recorded
                release_memory()
                course.report.halved += 1
                course.waiting = cutter.halved(numbers, prompts, parts, message)
                if context.parted is not None and context.parted.handed_over:
                    course.report.void = 1
                    return course.report
            elif refused:
                # From the start: what was visited lacks these parameters.
                runner.leave_out(refused)
                if context.parted is not None:
                    course.report.void = 1
                    return course.report
                runner.choose(rollouts)
                held.clear()
                kept.void()
                cutter = _Cutter(runner, limit, request)
                course = Course(cutter.groups(units))
            else:
                visit(numbers, recorded)
                course.report.microbatches += len(parts)
                course.report.largest = max(course.report.largest, *(cutter.size(part) for part in parts))
                course.report.prompt_forwards = max(course.report.prompt_forwards, runner.way.prompt_forwards)
                del course.waiting[0]
                _one_more(context, runner, limit, request, kept, course, total)
        kept.end(course.details(limit, runner.left_out, str(runner.way)))
    return course.report


def _begin(
    context: ProbeContext, runner: Runner, limit: MicrobatchLimit, request: SweepRequest, kept: KeptSweep
) -> tuple[Course, _Cutter]:
    """Where a sweep begins, or goes on; the runner and the limit are as they were there.

    Raises:
        ResumeError: the model goes another way than it did.
    """
    if kept.details is None:
        cutter = _Cutter(runner, limit, request)
        return Course(cutter.groups(request.units)), cutter
    course, then = Course.from_details(kept.details, kept.position, len(request.units))
    limit.tokens, limit.prompts = then.tokens, then.prompts
    if set(kept.details["left_out"]) != set(runner.left_out):
        runner.leave_out(set(kept.details["left_out"]))
        runner.choose(request.rollouts)
    if kept.details["way"] != str(runner.way):
        raise ResumeError(
            f"the checkpoint was written where microbatches went this way: {kept.details['way']}; here it is: {runner.way}.",
            fix="go on with the same versions of libraries on the same kind of machine, or delete the checkpoint.",
        )
    total, done = sum(map(len, request.units)), sum(map(len, request.units[: kept.position]))
    context.report(request.stage, done, total)
    return course, _Cutter(runner, limit, request)


def _one_more(
    context: ProbeContext,
    runner: Runner,
    limit: MicrobatchLimit,
    request: SweepRequest,
    kept: KeptSweep,
    course: Course,
    total: int,
) -> None:
    """A group is done."""
    position = course.position(len(request.units))
    kept.advance(position, course.details(limit, runner.left_out, str(runner.way)))
    try:
        context.report(request.stage, sum(map(len, request.units[:position])), total)
    except KeyboardInterrupt:
        kept.interrupted()
        raise


def chosen(context: ProbeContext, runner: Runner, rollouts: Rollouts, least: int = 0) -> int:
    """The place of the runner's way among those that are known, chosen now unless it is; not before ``least``."""
    with context.probe_state(), torch.compiler.set_stance("force_eager"):
        runner.choose(rollouts, least)
    return runner.place


def runs_whole(
    context: ProbeContext, runner: Runner, limit: MicrobatchLimit, rollouts: Rollouts, units: list[list[int]]
) -> bool:
    """Whether a batch goes through in one forward whose coefficients are formed all at once; arguments as of `sweep`."""
    with context.probe_state(), torch.compiler.set_stance("force_eager"):
        runner.choose(rollouts)
        cutter = _Cutter(runner, limit, SweepRequest(rollouts, units, context.columns, "plan"))
        groups = cutter.groups(units)
        prompts = [prompt for unit in units for prompt in unit]
        return runner.way.weighs_whole and len(groups) == 1 and len(cutter.parts(prompts)) == 1


def score_batch(
    context: ProbeContext, runner: Runner, limit: MicrobatchLimit, rollouts: Rollouts, prompts: Sequence[int]
) -> TokenScores:
    """Log-probs and entropies of a batch's given prompts, by forwards without a graph; 0 at those of others.

    Arguments and errors as of `sweep`.
    """
    request, scores = scoring_of(context, rollouts, prompts), TokenScores.empty(rollouts)
    held = Held({"scores": Tables(vars(scores))})
    with context.probe_state(), torch.compiler.set_stance("force_eager"):
        runner.choose(rollouts)
        kept = context.keeper.sweep(lambda: request.named, held)
        course, cutter = _begin(context, runner, limit, request, kept)
        while course.waiting:
            numbers = course.waiting[0]
            own = [prompts[number] for number in numbers]
            rows = torch.cat([rollouts.rows_of_prompt(prompt) for prompt in own])
            try:
                scores.put(
                    runner.way.score(Microbatch(rollouts, rows, rollouts.prompt_index[rows].tolist(), context.columns))
                )
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                message = (str(error) or type(error).__name__).splitlines()[0]
                release_memory()
                course.waiting = cutter.halved(numbers, own, [own], message)
                continue
            del course.waiting[0]
            _one_more(context, runner, limit, request, kept, course, len(prompts))
        kept.end(course.details(limit, runner.left_out, str(runner.way)))
    return scores


def scoring_of(context: ProbeContext, rollouts: Rollouts, prompts: Sequence[int]) -> SweepRequest:
    """What `score_batch` goes through."""
    return SweepRequest(rollouts, [[prompt] for prompt in prompts], context.columns, "scores")


def _run_parts(
    runner: Runner, request: SweepRequest, numbers: list[int], parts: list[list[int]], recorded: RowRecorder
) -> tuple[set[str], str | None]:
    """Run the parts of a group of units; parameters that are not capturable, and what was said where memory ran out."""
    rollouts = request.rollouts
    unit_of = {prompt: place for place, number in enumerate(numbers) for prompt in request.units[number]}
    try:
        for part in parts:
            rows = torch.cat([rollouts.rows_of_prompt(prompt) for prompt in part])
            unit = [unit_of[int(prompt)] for prompt in rollouts.prompt_index[rows]]
            refused = runner.run(Microbatch(rollouts, rows, unit, request.columns), recorded, request.table)
            if refused:
                return refused, None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return set(), (str(error) or type(error).__name__).splitlines()[0]
    return set(), None


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

    def __init__(self, runner: Runner, limit: MicrobatchLimit, request: SweepRequest) -> None:
        self._runner, self._limit, self._units = runner, limit, request.units
        shared = runner.way.shares and not request.whole_sequences
        self._tokens = prompt_tokens(request.rollouts, shared=shared)

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

    def halved(self, numbers: list[int], prompts: list[int], parts: list[list[int]], message: str) -> list[list[int]]:
        """The groups from this one on, with forwards half as large: later ones would run out of memory as well.

        Raises:
            ProbeMemoryError: they are single prompts.
        """
        tried = [prompts] if len(numbers) > 1 else parts
        most = max(len(part) for part in tried)
        if most == 1:
            raise ProbeMemoryError(
                f"memory ran out with a single prompt of {max(map(self.size, parts))} tokens in a forward: {message}",
                fix="switch on gradient checkpointing, probe shorter responses or fewer per prompt; or lower memory_budget "
                "if every unit's gradients are kept.",
            )
        self._limit.tokens = max(1, max(self.size(part) for part in tried) // 2)
        if self._limit.prompts is not None:
            self._limit.prompts = most // 2
        first = numbers[0]
        return [[first + place for place in group] for group in self.groups(self._units[first:])]

    @property
    def _by_tokens(self) -> bool:
        return self._limit.prompts is None and self._runner.way.packs
