"""The sweeps of one probe: what they share, and what ranks settle with one another after each.

Legend: X_u gradient of unit u in a functional column, g_u raw in an update column; sums of them over all units of all ranks.

No rank waits for another within a sweep: each goes through its own units. Afterwards parameters that any of them had to leave
out are left out by all, and a forward is nowhere larger than the smallest that memory allowed on any of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.capture import Directions, GradientRecorder, ProjectionRecorder
from entropy_fast.columns import Columns, SequenceTable, TokenScores
from entropy_fast.config import RunOptions
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.agreement import united
from entropy_fast.distributed.collectives import add_up, any_of, least_of, most_of
from entropy_fast.distributed.dealing import Share, share_of
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.one_pass.costs import CostModel
from entropy_fast.engines.one_pass.course import MicrobatchLimit, SweepReport
from entropy_fast.engines.one_pass.gradient_stack import GradientStack
from entropy_fast.engines.one_pass.plan import OnePassPlan, PassLog
from entropy_fast.engines.one_pass.runner import Runner
from entropy_fast.engines.one_pass.sweep import (
    Found,
    SweepRequest,
    chosen,
    runs_whole,
    score_batch,
    scoring_of,
    sweep,
)
from entropy_fast.resuming import Held, Tables
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import prompt_units
from entropy_fast.sharded.parted import Arrive

__all__ = ["Sweeper"]


class Sweeper:
    """Sweeps of one model.

    Args:
        context: of the probe.
    """

    def __init__(self, context: ProbeContext) -> None:
        self._context, self._team = context, context.team
        self._runner = Runner(context)
        self._costs = CostModel.of(context.model, context.registry.module, context.device)
        self._limit = _first_limit(context.run, self._costs)
        self._log = PassLog(self._costs)

    @property
    def note(self) -> str | None:
        """See `Runner.note`."""
        return self._runner.note

    def share(self, rollouts: Rollouts, blocks: int | None) -> Share:
        """The units of a batch, dealt to ranks."""
        return share_of(self._team, rollouts, prompt_units(rollouts.n_prompts, blocks))

    def runs_whole(self, context: ProbeContext, share: Share) -> bool:
        """Whether one forward of this rank says all that there is to know of a batch's coefficients."""
        return self._team.size == 1 and runs_whole(context, self._runner, self._limit, share.rollouts, share.units)

    def has_scores(self, rollouts: Rollouts) -> bool:
        """Whether a checkpoint has what the policy says of a batch, so that a process before this one had to find it."""
        prompts = self.share(rollouts, None).prompts
        return self._context.keeper.holds(lambda: scoring_of(self._context, rollouts, prompts).named)

    def stack_bytes(self, share: Share, columns: Columns) -> int:
        """What gradients of the units that a rank keeps take, on the rank that has most."""
        parted = self._context.parted
        if parted is None:
            return GradientStack.bytes_of(self._context.registry.tensors, share.most, len(columns))
        return len(columns) * len(share.every) * parted.most_bytes

    def empty_sum(self) -> GradientSum:
        """Zeros for every parameter that this rank keeps."""
        return GradientSum.zeros(self._context.kept.tensors, self._context.sums_device)

    def add(self, totals: Sequence[GradientSum], gradients: Sequence[Mapping[str, Tensor]]) -> None:
        """Add gradients of a few units to their sums, by column."""
        for index, name in enumerate(self._context.kept.names):
            there = [found.get(name) for found in gradients]
            for total, own in zip(totals, there, strict=True):
                if own is not None:
                    total.tensors[index].add_(own.sum(0).to(total.tensors[index].device))
                total.touched[index] |= any(found is not None for found in there)

    def add_ranks(self, totals: Sequence[GradientSum]) -> None:
        """Sums over the units of this rank become those over all."""
        self._team.enter("gradient sums")
        if self._context.parted is not None:
            return
        for total in totals:
            add_up(self._team, total.tensors)
            total.touched[:] = any_of(self._team, total.touched)

    def score(self, rollouts: Rollouts) -> TokenScores:
        """Log-probs and entropies of every response token of a batch, by forwards without a graph."""
        self._log.scored += 1
        share = self.share(rollouts, None)
        self._team.enter("scores")
        self._settle(rollouts)
        found = score_batch(self._context, self._runner, self._limit, rollouts, share.prompts)
        share.fill([found.logprobs, found.entropies])
        return found

    def sums_of(
        self, share: Share, columns: Columns, table: SequenceTable
    ) -> tuple[list[GradientSum], GradientStack | None]:
        """Raw sums of every column over all units, and, where they fit the budget, its gradients of this rank's units."""
        kept, layout = self._context.kept, self._context.layout
        totals = [self.empty_sum() for _ in columns]
        stage = " and ".join(c.name for c in columns)
        stack = None
        if self.stack_bytes(share, columns) > self._context.run.memory_bytes:
            held = Held({f"sum {place}": total for place, total in enumerate(totals)})
            self.sweep(share, columns, stage, lambda _, found: self.add(totals, found), held, table, sums=True)
        else:
            on_cpu = self._context.run.accumulate_on == "cpu"
            n_units = len(layout.units(share))
            stack = GradientStack(kept.names, kept.tensors, n_units, len(columns), on_cpu=on_cpu)
            self._log.stored = max(self._log.stored, self.stack_bytes(share, columns))
            if self._context.parted is not None:
                self.sweep(share, columns, stage, stack.add, Held({"stack": stack}), table)
            else:
                request = SweepRequest(share.rollouts, share.units, columns, stage, table)
                held = Held({"stack": stack}, units=stack)
                self._record(request, lambda n: self._recorder(n, columns, stack.storage(n)), stack.collect, held)
            for total, stored in zip(totals, stack.columns, strict=True):
                for index, tensor in enumerate(stored):
                    if stack.touched[index]:
                        torch.sum(tensor, 0, out=total.tensors[index])
                total.touched[:] = stack.touched
        self.add_ranks(totals)
        share.fill(table.known)
        return totals, stack

    def project(self, share: Share, directions: Directions, columns: Columns, *, by_unit: bool) -> Tensor:
        """``[N, C]`` every sequence's part in the columns, projected; by one sweep of whole sequences.

        Directions are by name of a parameter and place of a unit among this rank's.
        """
        device, n_sequences = self._context.device, share.rollouts.n_sequences
        values = torch.zeros(n_sequences, len(columns), dtype=torch.float64, device=device)

        def recorder(numbers: list[int]) -> ProjectionRecorder:
            return ProjectionRecorder(
                lambda name, place: directions(name, numbers[place]),
                n_sequences,
                range(len(columns)),
                device,
                by_unit=by_unit,
            )

        def collect(_: list[int], found: ProjectionRecorder) -> None:
            values.add_(found.values)

        request = SweepRequest(share.rollouts, share.units, columns, "sequences", whole_sequences=True)
        self._record(request, recorder, collect, Held({"values": Tables({"values": values})}))
        found = values.cpu()
        share.fill([found])
        return found

    def sweep(
        self,
        share: Share,
        columns: Columns,
        stage: str,
        visit: Arrive,
        held: Held,
        table: SequenceTable | None = None,
        *,
        sums: bool = False,
        together: bool = False,
    ) -> None:
        """Go through the units of a batch.

        Args:
            share: of the batch.
            columns: whose gradients are wanted.
            stage: name for the progress report.
            visit: given gradients of some units of this rank, by their numbers in the batch. Where ranks have parameters of
                their own it is given those, of any rank's units, and units may come in parts.
            held: whatever ``visit`` adds up.
            table: see `SweepRequest`.
            sums: whether ``visit`` only adds units up and does not ask for their numbers.
            together: whether units must not come in parts.
        """
        request = SweepRequest(share.rollouts, share.units, columns, stage, table)
        parted = self._context.parted
        if parted is None:

            def see(places: list[int], gradients: GradientRecorder) -> None:
                visit([share.numbers[place] for place in places], gradients.columns)

            self._record(request, lambda numbers: self._recorder(numbers, columns), see, held)
            return

        def begin(places: list[int]) -> GradientRecorder:
            gradients = self._recorder(places, columns, by_need=True)
            parted.begin(gradients, [] if sums else [share.numbers[place] for place in places])
            return gradients

        arriving = functools.partial(parted.arriving, visit, together=together)
        self._record(request, begin, lambda _, __: parted.end(), held, arriving)

    def _recorder(
        self,
        numbers: list[int],
        columns: Columns,
        storage: Mapping[str, Sequence[Tensor]] | None = None,
        *,
        by_need: bool = False,
    ) -> GradientRecorder:
        registry = self._context.registry
        parameters = dict(zip(registry.names, registry.tensors, strict=True))
        return GradientRecorder(parameters, len(numbers), len(columns), storage, by_need=by_need)

    def plan(self) -> OnePassPlan:
        """How the batches were gone through, by all ranks; after all sweeps."""
        return self._log.plan(self._context, self._runner)

    def _record(
        self,
        request: SweepRequest,
        recorder: Callable[[list[int]], Found],
        visit: Callable[[list[int], Found], None],
        held: Held,
        arriving: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """One `sweep`, counted in the plan."""
        team = self._team
        team.enter(request.stage)
        self._settle(request.rollouts)

        def go() -> SweepReport:
            with arriving():
                return sweep(self._context, self._runner, self._limit, request, recorder, visit, held)

        report = go()
        if team.size > 1:
            # What one of them had to leave out, the others leave out too, and go through their units once more. Where its
            # gradients have gone to others, so do all.
            again = True
            while again:
                missing = set(united(team, self._runner.left_out)) - set(self._runner.left_out)
                again, void = any_of(team, [bool(missing), bool(report.void)])
                void |= again and self._context.parted is not None
                again |= void
                if missing:
                    self._runner.leave_out(missing)
                if missing or void:
                    held.clear()
                    report = go()
            self._settle(request.rollouts)
            self._limit.tokens, prompts = least_of(team, [self._limit.tokens, self._limit.prompts or 0])
            self._limit.prompts = prompts or None
        self._log.add(request, report, self._runner.way)

    def _settle(self, rollouts: Rollouts) -> None:
        """All ranks go the same way: the first that none of them has a reason against."""
        if self._team.size == 1:
            return
        least, behind = 0, True
        while behind:
            own = chosen(self._context, self._runner, rollouts, least)
            least = most_of(self._team, [own])[0]
            behind = any_of(self._team, [own < least])[0]


def _first_limit(options: RunOptions, costs: CostModel) -> MicrobatchLimit:
    """As many tokens as products need for their full rate, if their activations fit the budget."""
    fitting = options.memory_bytes // max(1, costs.bytes_per_token)
    return MicrobatchLimit(max(1, min(costs.full_rate_tokens, fitting)), options.prompts_per_microbatch)
