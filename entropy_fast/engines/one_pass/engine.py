"""The one-pass engine: the gradients of every unit in every column from one forward and few backwards of the batch.

Legend (docs/theory.md): S_i sequence log-prob, c_i and a_i coefficients of the functional and the update column,
X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, Y_u = P g_u, K_uw = X_u · Y_w, E entropy batch, U update batch.

One backward of Σ_i S_i brings every sequence its own ∇S_i signal; the coefficients, which the forward has made known by
then, are applied where each parameter's signal arrives (`entropy_fast.capture`). A column whose coefficients differ from token
to token takes a backward of its own. Parameters that are used in ways no captured module knows get their gradients from
backwards of their own over the same graph, and are named in the result's notes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.capture import Directions, GradientRecorder, ProjectionRecorder
from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.columns import Columns, SequenceTable, Side
from entropy_fast.context import ProbeContext
from entropy_fast.engines.gradient_sum import GradientSum, parameter_products
from entropy_fast.engines.one_pass.by_sequence import one_batch_parts, refuse_without_stack, two_batch_parts
from entropy_fast.engines.one_pass.costs import CostModel
from entropy_fast.engines.one_pass.gradient_stack import GradientStack, kernel_of
from entropy_fast.engines.one_pass.plan import PassLog
from entropy_fast.engines.one_pass.runner import Runner
from entropy_fast.engines.one_pass.sweep import Found, MicrobatchLimit, SweepRequest, sweep
from entropy_fast.engines.sums import FinishedSums, finish_update, finished
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured
from entropy_fast.ops import precondition_accumulate
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
        context, columns = self._context, self._context.columns
        units = prompt_units(rollouts.n_prompts, context.estimate.blocks)
        for wanted in ("by_sequence", "full_kernel"):
            if getattr(context.run, wanted):
                refuse_without_stack(wanted, self._stack_bytes(units, columns), context.run.memory_bytes)
        table = self._table(rollouts, columns)
        totals, stack = self._sums_of(rollouts, units, columns, table)
        x_places, (y_place,) = (columns.places_of(side) for side in Side)
        x_totals = [totals[place] for place in x_places]
        sums = finished(context, x_totals[0], totals[y_place], rollouts, rollouts)
        products = [sums.products, *(parameter_products(x, sums.y) for x in x_totals[1:])]
        if stack is None:
            found = self._second_sweep(rollouts, units, columns, x_totals, sums.y, products)
        else:
            x_stacks, y_stack = [stack.columns[place] for place in x_places], stack.columns[y_place]
            context.step.precondition_in_place(y_stack)
            sizes = torch.tensor([len(unit) for unit in units])
            found = [_sums_of_stacks(x, y_stack, sizes, own) for x, own in zip(x_stacks, products, strict=True)]
            if context.run.by_sequence:
                parts = one_batch_parts(context, self._project, rollouts, units, sums, (x_stacks[0], y_stack))
                found[0] = dataclasses.replace(found[0], by_sequence=parts)
        return self._measured(found, sums, {side.value: table for side in Side})

    def two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        """See `Engine.two_batch`: U first, then E with X_n · Y_sum in the same backward."""
        assert_grad_context("OnePassEngine.two_batch")
        context = self._context
        functional, updates = (context.columns.of_side(side) for side in Side)
        tables = {
            Side.FUNCTIONAL.value: self._table(entropy, functional),
            Side.UPDATE.value: self._table(update, updates),
        }
        update_units = prompt_units(update.n_prompts, None)
        (g_total,), stack = self._sums_of(update, update_units, updates, tables["update"])
        y_sum = finish_update(context, g_total, update)[0]
        x_totals = [self._empty_sum() for _ in functional]
        rows = torch.zeros(len(functional), entropy.n_prompts, dtype=torch.float64)

        def project_entropy(numbers: list[int], gradients: GradientRecorder) -> None:
            for place, (of_units, x_total) in enumerate(zip(gradients.columns, x_totals, strict=True)):
                for position, number in enumerate(numbers):
                    rows[place, number] = self._dots(of_units, of_units, position, x_total, y_sum)[:, 1].sum()
                self._add(x_total, of_units)

        def start_again() -> None:
            for x_total in x_totals:
                x_total.clear()

        entropy_units = prompt_units(entropy.n_prompts, None)
        request = SweepRequest(entropy, entropy_units, functional, "entropy", tables["entropy"])
        self._sweep(request, project_entropy, start_again=start_again)
        sums = finished(context, x_totals[0], g_total, entropy, update)
        columns = torch.zeros(len(functional), update.n_prompts, dtype=torch.float64)
        if stack is not None:
            context.step.precondition_in_place(stack.columns[0])
            for place, x_total in enumerate(x_totals):
                columns[place] = kernel_of([x.unsqueeze(0) for x in x_total.tensors], stack.columns[0])[0][0]
        else:

            def project_update(numbers: list[int], gradients: GradientRecorder) -> None:
                (of_units,) = gradients.columns
                for place, x_total in enumerate(x_totals):
                    for position, number in enumerate(numbers):
                        columns[place, number] = self._dots(of_units, of_units, position, x_total, sums.y)[:, 2].sum()

            request = SweepRequest(update, update_units, updates, "projections")
            self._sweep(request, project_update, start_again=lambda: None)
        products = [sums.products, *(parameter_products(x, sums.y) for x in x_totals[1:])]
        found = [
            KernelSums(float(own.sum()), by_row, by_column, by_parameter=own)
            for own, by_row, by_column in zip(products, rows, columns, strict=True)
        ]
        if context.run.by_sequence:
            parts = two_batch_parts(context, self._project, entropy, update, sums)
            found[0] = dataclasses.replace(found[0], by_sequence=parts)
        return self._measured(found, sums, tables)

    def _second_sweep(
        self,
        rollouts: Rollouts,
        units: list[list[int]],
        columns: Columns,
        x_totals: Sequence[GradientSum],
        y_sum: GradientSum,
        products: Sequence[Tensor],
    ) -> list[KernelSums]:
        """Diagonal, row and column sums of every functional column, from every unit's products with the sums."""
        x_places, (y_place,) = (columns.places_of(side) for side in Side)
        dots = torch.zeros(len(x_places), len(units), 3, dtype=torch.float64)
        diagonals = torch.zeros(len(x_places), len(products[0]), dtype=torch.float64)

        def project(numbers: list[int], gradients: GradientRecorder) -> None:
            g_units = gradients.columns[y_place]
            for index, (place, x_total) in enumerate(zip(x_places, x_totals, strict=True)):
                for position, number in enumerate(numbers):
                    own = self._dots(gradients.columns[place], g_units, position, x_total, y_sum)
                    dots[index, number] = own.sum(0)
                    diagonals[index].add_(own[:, 0])

        def start_again() -> None:
            dots.zero_()
            diagonals.zero_()

        self._sweep(SweepRequest(rollouts, units, columns, "projections"), project, start_again=start_again)
        sizes, found = torch.tensor([len(unit) for unit in units]), []
        for own, of_units, product in zip(diagonals, dots, products, strict=True):
            diagonal, row_sums, column_sums = (part.contiguous() for part in of_units.unbind(1))
            total = float(product.sum())
            found.append(KernelSums(total, row_sums, column_sums, diagonal, sizes, None, product - own))
        return found

    def _measured(
        self, found: Sequence[KernelSums], sums: FinishedSums, tables: Mapping[str, SequenceTable]
    ) -> Measured:
        note = self._runner.note
        if note is not None:
            warnings.warn(note, EntropyFastWarning, stacklevel=4)
        plan = self._log.plan(self._context, self._runner)
        notes = () if note is None else (note,)
        others = list(self._context.columns.of_side(Side.FUNCTIONAL))[1:]
        apart = {column.name: own for column, own in zip(others, found[1:], strict=True)}
        return Measured(found[0], sums.coverage, tables, sums.excluded, sums.leading_products, plan, notes, apart)

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

    def _dots(
        self,
        x_units: Mapping[str, Tensor],
        g_units: Mapping[str, Tensor],
        position: int,
        x_sum: GradientSum,
        y_sum: GradientSum,
    ) -> Tensor:
        """``[parameters, 3]`` X_u · Y_u, X_u · Y_sum and Y_u · X_sum of one unit, fp64 on the CPU."""
        names, moments = self._context.registry.names, self._context.step.second_moments(x_sum.tensors)
        chosen = [index for index, name in enumerate(names) if name in x_units]
        x, g = (
            [units[names[index]][position].to(x_sum.tensors[index].device) for index in chosen]
            for units in (x_units, g_units)
        )
        dots = torch.zeros(len(names), 3, dtype=torch.float64)
        dots[chosen] = precondition_accumulate(
            x,
            g,
            [moments.tensors[index] for index in chosen],
            [x_sum.tensors[index] for index in chosen],
            [y_sum.tensors[index] for index in chosen],
            bias_correction=[moments.bias_correction[index] for index in chosen],
            eps=[moments.eps[index] for index in chosen],
            ratio=[moments.ratio[index] for index in chosen],
            update=False,
        ).cpu()
        return dots


def _sums_of_stacks(
    x_stack: Sequence[Tensor], y_stack: Sequence[Tensor], sizes: Tensor, products: Tensor
) -> KernelSums:
    """From the gradients of all units in a functional column and in the update's; ``products`` of their sums by parameter."""
    kernel, diagonals = kernel_of(x_stack, y_stack)
    row_sums, column_sums, diagonal = kernel.sum(1), kernel.sum(0), kernel.diagonal().clone()
    return KernelSums(float(products.sum()), row_sums, column_sums, diagonal, sizes, kernel, products - diagonals)
