"""The one-pass engine: the gradients of every unit in every column from one forward and few backwards of the batch.

Legend (docs/theory.md): S_i sequence log-prob, c_i and a_i coefficients of the functional and the update column,
X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, Y_u = P g_u, K_uw = X_u · Y_w, E entropy batch, U update batch.

One backward of Σ_i S_i brings every sequence its own ∇S_i signal; the coefficients, which the forward has made known by
then, are applied where each parameter's signal arrives (`entropy_fast.capture`). A column whose coefficients differ from token
to token takes a backward of its own. Parameters that are used in ways no captured module knows get their gradients from
backwards of their own over the same graph, and are named in the result's notes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.capture import Directions, GradientRecorder, ProjectionRecorder
from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.columns import Columns, ResolvedColumn, SequenceTable, Side, TokenScores
from entropy_fast.columns.scores import ScoresNeededError
from entropy_fast.context import ProbeContext
from entropy_fast.engines.along import AlongSums, steps_of_others
from entropy_fast.engines.along_updates import along_sums, with_rows
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.one_pass.by_sequence import (
    less_own,
    met_by_unit,
    one_batch_shares,
    refuse_without_stack,
    two_batch_shares,
)
from entropy_fast.engines.one_pass.costs import CostModel
from entropy_fast.engines.one_pass.gradient_stack import GradientStack, kernel_of
from entropy_fast.engines.one_pass.kernels import products_of, sums_of_dots, sums_of_stacks
from entropy_fast.engines.one_pass.plan import PassLog
from entropy_fast.engines.one_pass.runner import Runner
from entropy_fast.engines.one_pass.sweep import Found, MicrobatchLimit, SweepRequest, runs_whole, score_batch, sweep
from entropy_fast.engines.resolving import resolved_context
from entropy_fast.engines.sums import FinishedSums, by_column, finish_update, finished
from entropy_fast.engines.unit_dots import stacks_of, unit_dots, unit_of
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import prompt_units

__all__ = ["OnePassEngine"]

Storage = Callable[[list[int]], Mapping[str, Sequence[Tensor]]]  # for the given units, zeroed


class OnePassEngine:
    """Kernel sums by capture.

    Args:
        context: of the probe.
    """

    def __init__(self, context: ProbeContext) -> None:
        self._context = context
        self._runner = Runner(context)
        self._costs = CostModel.of(context.model, context.registry.module, context.device)
        self._limit = MicrobatchLimit.of(context.run, self._costs)
        self._log = PassLog(self._costs)

    def same_batch(self, rollouts: Rollouts) -> Measured:
        """See `Engine.same_batch`; the whole kernel K where gradients of all units fit the budget.

        Raises:
            ConfigError: ``by_sequence`` or ``full_kernel`` was asked for, and gradients of all units do not fit the budget.
        """
        assert_grad_context("OnePassEngine.same_batch")
        units = prompt_units(rollouts.n_prompts, self._context.estimate.blocks)
        if not self._resolves_itself(rollouts, units):
            self._resolve(rollouts, rollouts)
        with contextlib.suppress(ScoresNeededError):
            return self._same_batch(rollouts, units)
        # Memory ran out, and the batch goes through in parts after all; what the first try held is let go before.
        self._resolve(rollouts, rollouts)
        return self._same_batch(rollouts, units)

    def _same_batch(self, rollouts: Rollouts, units: list[list[int]]) -> Measured:
        context, columns = self._context, self._context.columns
        for wanted in ("by_sequence", "by_token", "full_kernel"):
            if getattr(context.run, wanted):
                refuse_without_stack(wanted, self._stack_bytes(units, columns), context.run.memory_bytes)
        table = self._table(rollouts, columns)
        totals, stack = self._sums_of(rollouts, units, columns, table)
        x_places, y_places = (columns.places_of(side) for side in Side)
        x_totals = [totals[place] for place in x_places]
        sums = finished(context, x_totals[0], totals[y_places[0]], rollouts, rollouts)
        y_sums = self._y_sums(sums, [totals[place] for place in y_places], rollouts)
        products = products_of(sums, x_totals, y_sums)
        if stack is None:
            along = along_sums(context, [totals[place] for place in y_places], rollouts, len(x_places), None)
            found = self._second_sweep(rollouts, units, columns, x_totals, y_sums, products, along)
        else:
            x_stacks, y_stacks = ([stack.columns[place] for place in places] for places in (x_places, y_places))
            sizes = torch.tensor([len(unit) for unit in units])
            along = along_sums(context, [totals[place] for place in y_places], rollouts, len(x_places), y_stacks)
            for own, y_stack in zip(along, y_stacks, strict=False):
                own.add(range(len(units)), x_stacks, y_stack, sizes)
            met = met_by_unit(context, along, y_stacks[0], sizes)
            for y_stack in y_stacks:
                context.step.precondition_in_place(y_stack)
            found = [
                [sums_of_stacks(x, y_stack, sizes, own) for x, own in zip(x_stacks, of_update, strict=True)]
                for y_stack, of_update in zip(y_stacks, products, strict=True)
            ]
            found = with_rows(found, along)
            met = met or less_own(sums.y, y_stacks[0])
            found[0] = one_batch_shares(context, self._project, rollouts, found[0], x_totals, x_stacks, met)
        return self._measured(found, sums, {side.value: table for side in Side}, along)

    def two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        """See `Engine.two_batch`: U first, then E with X_n · Y_sum in the same backward."""
        assert_grad_context("OnePassEngine.two_batch")
        entropy_units, update_units = (prompt_units(batch.n_prompts, None) for batch in (entropy, update))
        self._resolve(
            None if self._resolves_itself(entropy, entropy_units, Side.FUNCTIONAL) else entropy,
            None if self._resolves_itself(update, update_units, Side.UPDATE) else update,
        )
        with contextlib.suppress(ScoresNeededError):
            return self._two_batch(entropy, update)
        self._resolve(entropy, update)
        return self._two_batch(entropy, update)

    def _two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        context = self._context
        functional, updates = (context.columns.of_side(side) for side in Side)
        tables = {
            Side.FUNCTIONAL.value: self._table(entropy, functional),
            Side.UPDATE.value: self._table(update, updates),
        }
        update_units = prompt_units(update.n_prompts, None)
        g_totals, stack = self._sums_of(update, update_units, updates, tables["update"])
        y_sums = [finish_update(context, total, update)[0] for total in g_totals]
        x_totals = [self._empty_sum() for _ in functional]
        rows = torch.zeros(len(updates), len(functional), entropy.n_prompts, dtype=torch.float64)
        along = along_sums(context, g_totals, update, len(functional), None, entropy.n_prompts)
        names = context.registry.names

        def project_entropy(numbers: list[int], gradients: GradientRecorder) -> None:
            stacks = stacks_of(gradients, names)
            for own in along:
                own.add(numbers, stacks, None, torch.ones(len(numbers)))
            for place, (of_units, x_total) in enumerate(zip(stacks, x_totals, strict=True)):
                for position, number in enumerate(numbers):
                    unit = unit_of(of_units, position)
                    for which, y_sum in enumerate(y_sums):
                        found = unit_dots(context, unit, unit, x_total, y_sum)
                        rows[which, place, number] = found[:, 1].sum()
                self._add(x_total, gradients.columns[place])

        def start_again() -> None:
            for x_total in x_totals:
                x_total.clear()
            for own in along:
                own.clear()

        entropy_units = prompt_units(entropy.n_prompts, None)
        request = SweepRequest(entropy, entropy_units, functional, "entropy", tables["entropy"])
        self._sweep(request, project_entropy, start_again=start_again)
        sums = finished(context, x_totals[0], g_totals[0], entropy, update)
        columns = torch.zeros(len(updates), len(functional), update.n_prompts, dtype=torch.float64)
        if stack is not None:
            for which, y_stack in enumerate(stack.columns):
                context.step.precondition_in_place(y_stack)
                for place, x_total in enumerate(x_totals):
                    columns[which, place] = kernel_of([x.unsqueeze(0) for x in x_total.tensors], y_stack)[0][0]
        else:

            def project_update(numbers: list[int], gradients: GradientRecorder) -> None:
                for which, (of_units, y_sum) in enumerate(zip(stacks_of(gradients, names), y_sums, strict=True)):
                    for place, x_total in enumerate(x_totals):
                        for position, number in enumerate(numbers):
                            unit = unit_of(of_units, position)
                            columns[which, place, number] = unit_dots(context, unit, unit, x_total, y_sum)[:, 2].sum()

            request = SweepRequest(update, update_units, updates, "projections")
            self._sweep(request, project_update, start_again=lambda: None)
        found = [
            [
                KernelSums(float(own.sum()), by_row, by_column, by_parameter=own)
                for own, by_row, by_column in zip(*of_update, strict=True)
            ]
            for of_update in zip(products_of(sums, x_totals, y_sums), rows, columns, strict=True)
        ]
        found = with_rows(found, along)
        met = list(sums.y.tensors) if not along else steps_of_others(along[0].seen)
        found[0] = two_batch_shares(context, self._project, entropy, update, found[0], x_totals, met)
        return self._measured(found, sums, tables, along)

    def _second_sweep(
        self,
        rollouts: Rollouts,
        units: list[list[int]],
        columns: Columns,
        x_totals: Sequence[GradientSum],
        y_sums: Sequence[GradientSum],
        products: Sequence[Sequence[Tensor]],
        along: Sequence[AlongSums],
    ) -> list[list[KernelSums]]:
        """Diagonal, row and column sums of every pair of columns, from every unit's products with the sums."""
        context, names = self._context, self._context.registry.names
        sizes = torch.tensor([len(unit) for unit in units])
        x_places, y_places = (columns.places_of(side) for side in Side)
        dots = torch.zeros(len(y_places), len(x_places), len(units), 3, dtype=torch.float64)
        diagonals = torch.zeros(len(y_places), len(x_places), len(products[0][0]), dtype=torch.float64)

        def project(numbers: list[int], gradients: GradientRecorder) -> None:
            stacks = stacks_of(gradients, names)
            for place, own in zip(y_places, along, strict=False):
                own.add(numbers, [stacks[x_place] for x_place in x_places], stacks[place], sizes[numbers])
            for position, number in enumerate(numbers):
                unit = [unit_of(stack, position) for stack in stacks]
                for which, (y_place, y_sum) in enumerate(zip(y_places, y_sums, strict=True)):
                    for index, (x_place, x_total) in enumerate(zip(x_places, x_totals, strict=True)):
                        dot = unit_dots(context, unit[x_place], unit[y_place], x_total, y_sum)
                        dots[which, index, number] = dot.sum(0)
                        diagonals[which, index].add_(dot[:, 0])

        def start_again() -> None:
            dots.zero_()
            diagonals.zero_()
            for own in along:
                own.clear()

        self._sweep(SweepRequest(rollouts, units, columns, "projections"), project, start_again=start_again)
        found = [
            [sums_of_dots(*own, sizes) for own in zip(*of_update, strict=True)]
            for of_update in zip(diagonals, dots, products, strict=True)
        ]
        return with_rows(found, along)

    def _y_sums(self, sums: FinishedSums, totals: Sequence[GradientSum], rollouts: Rollouts) -> list[GradientSum]:
        """Y_sum of every update column; the first is there."""
        return [sums.y, *(finish_update(self._context, total, rollouts)[0] for total in totals[1:])]

    def _resolve(self, entropy: Rollouts | None, update: Rollouts | None) -> None:
        """Find what columns wait for."""
        self._context = resolved_context(self._context, entropy, update, self.score)

    def _resolves_itself(self, rollouts: Rollouts, units: list[list[int]], side: Side | None = None) -> bool:
        """Whether one forward of the whole batch says what columns (of a side) wait for, so that none has to come before it."""
        context = self._context
        columns = context.columns if side is None else context.columns.of_side(side)
        return (
            context.scores is None
            and any(isinstance(column, ResolvedColumn) for column in columns)
            and self._stack_bytes(units, context.columns) <= context.run.memory_bytes
            and not (context.run.by_sequence or context.run.by_token)
            and runs_whole(context, self._runner, self._limit, rollouts, units)
        )

    def update_sum(self, rollouts: Rollouts) -> GradientSum:
        """Y_sum of the update over a batch.

        Raises:
            GradientCoverageError: see `Engine.same_batch`.
        """
        return finish_update(self._context, self.gradient_sum(rollouts), rollouts)[0]

    def gradient_sum(self, rollouts: Rollouts) -> GradientSum:
        """g_sum of the update over a batch, raw."""
        assert_grad_context("OnePassEngine.gradient_sum")
        self._resolve(rollouts, rollouts)
        updates = Columns(self._context.columns.of_side(Side.UPDATE).members[:1])
        units = prompt_units(rollouts.n_prompts, None)
        return self._sums_of(rollouts, units, updates, self._table(rollouts, updates))[0][0]

    def score(self, rollouts: Rollouts) -> TokenScores:
        """Log-probs and entropies of every response token of a batch, by forwards without a graph."""
        self._log.scored += 1
        return score_batch(self._context, self._runner, self._limit, rollouts)

    def _measured(
        self,
        found: Sequence[Sequence[KernelSums]],
        sums: FinishedSums,
        tables: Mapping[str, SequenceTable],
        along: Sequence[AlongSums],
    ) -> Measured:
        note = self._runner.note
        if note is not None:
            warnings.warn(note, EntropyFastWarning, stacklevel=4)
        plan = self._log.plan(self._context, self._runner)
        notes = () if note is None else (note,)
        first, apart, candidates = by_column(self._context.columns, found)
        agreement = along[0].seen.agreement if along else None
        return Measured(
            first,
            sums.coverage,
            tables,
            sums.excluded,
            sums.leading_products,
            plan,
            notes,
            apart,
            candidates,
            agreement,
        )

    def _table(self, rollouts: Rollouts, columns: Columns) -> SequenceTable:
        return SequenceTable.of(rollouts.n_sequences, columns, ratios=rollouts.old_logprobs is not None)

    def _empty_sum(self) -> GradientSum:
        return GradientSum.zeros(self._context.registry.tensors, self._context.sums_device)

    def _stack_bytes(self, units: list[list[int]], columns: Columns) -> int:
        return GradientStack.bytes_of(self._context.registry.tensors, len(units), len(columns))

    def _add(self, total: GradientSum, gradients: Mapping[str, Tensor]) -> None:
        total.add([gradients[n].sum(0) if n in gradients else None for n in self._context.registry.names])

    def _sums_of(
        self, rollouts: Rollouts, units: list[list[int]], columns: Columns, table: SequenceTable
    ) -> tuple[list[GradientSum], GradientStack | None]:
        """Raw sums of every column, and, where they fit the budget, its gradients of every unit."""
        registry = self._context.registry
        totals = [self._empty_sum() for _ in columns]
        request = SweepRequest(rollouts, units, columns, " and ".join(c.name for c in columns), table)
        if self._stack_bytes(units, columns) > self._context.run.memory_bytes:

            def collect(_: list[int], gradients: GradientRecorder) -> None:
                for total, found in zip(totals, gradients.columns, strict=True):
                    self._add(total, found)

            def start_again() -> None:
                for total in totals:
                    total.clear()

            self._sweep(request, collect, start_again=start_again)
            return totals, None
        on_cpu = self._context.run.accumulate_on == "cpu"
        stack = GradientStack(registry.names, registry.tensors, len(units), len(columns), on_cpu=on_cpu)
        self._log.stored = max(self._log.stored, self._stack_bytes(units, columns))
        self._sweep(request, stack.collect, start_again=stack.clear, storage=stack.storage)
        for total, stored in zip(totals, stack.columns, strict=True):
            for index, tensor in enumerate(stored):
                if stack.touched[index]:
                    torch.sum(tensor, 0, out=total.tensors[index])
            total.touched[:] = stack.touched
        return totals, stack

    def _project(
        self, rollouts: Rollouts, units: list[list[int]], directions: Directions, columns: Columns, *, by_unit: bool
    ) -> Tensor:
        """``[N, C]`` every sequence's part in the columns, projected; by one sweep of whole sequences."""
        device = self._context.device
        values = torch.zeros(rollouts.n_sequences, len(columns), dtype=torch.float64, device=device)

        def recorder(numbers: list[int]) -> ProjectionRecorder:
            return ProjectionRecorder(
                lambda name, place: directions(name, numbers[place]),
                rollouts.n_sequences,
                range(len(columns)),
                device,
                by_unit=by_unit,
            )

        def collect(_: list[int], found: ProjectionRecorder) -> None:
            values.add_(found.values)

        request = SweepRequest(rollouts, units, columns, "sequences", whole_sequences=True)
        self._record(request, recorder, collect, lambda: values.zero_())
        return values.cpu()

    def _sweep(
        self,
        request: SweepRequest,
        visit: Callable[[list[int], GradientRecorder], None],
        *,
        start_again: Callable[[], object],
        storage: Storage | None = None,
    ) -> None:
        registry = self._context.registry
        parameters = dict(zip(registry.names, registry.tensors, strict=True))

        def recorder(numbers: list[int]) -> GradientRecorder:
            kept = None if storage is None else storage(numbers)
            return GradientRecorder(parameters, len(numbers), len(request.columns), kept)

        self._record(request, recorder, visit, start_again)

    def _record(
        self,
        request: SweepRequest,
        recorder: Callable[[list[int]], Found],
        visit: Callable[[list[int], Found], None],
        start_again: Callable[[], object],
    ) -> None:
        """One `sweep`, counted in the plan."""
        report = sweep(self._context, self._runner, self._limit, request, recorder, visit, start_again)
        self._log.add(request, report, self._runner.way)
