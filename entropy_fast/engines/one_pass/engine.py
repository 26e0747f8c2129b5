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
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.columns import Columns, ResolvedColumn, SequenceTable, Side, TokenScores
from entropy_fast.columns.scores import ScoresNeededError
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.collectives import add_up
from entropy_fast.distributed.dealing import Share
from entropy_fast.engines.along import AlongSums, steps_of_others
from entropy_fast.engines.along_updates import along_sums, with_rows
from entropy_fast.engines.between_ranks import kernels_of
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.kernel import kernel_of
from entropy_fast.engines.one_pass.by_sequence import (
    less_own,
    met_by_unit,
    one_batch_shares,
    refuse_without_stack,
    two_batch_shares,
)
from entropy_fast.engines.one_pass.kernels import products_of, sums_of_dots, sums_of_kernel
from entropy_fast.engines.one_pass.sweeper import Sweeper
from entropy_fast.engines.resolving import resolved_context
from entropy_fast.engines.sums import FinishedSums, by_column, finish_update, finished
from entropy_fast.engines.unit_dots import stacks_of, unit_dots, unit_of
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured
from entropy_fast.resuming import Held, Tables
from entropy_fast.rollouts import Rollouts

__all__ = ["OnePassEngine"]


class OnePassEngine:
    """Kernel sums by capture.

    Args:
        context: of the probe.
    """

    def __init__(self, context: ProbeContext) -> None:
        self._context, self._sweeper = context, Sweeper(context)

    def same_batch(self, rollouts: Rollouts) -> Measured:
        """See `Engine.same_batch`; the whole kernel K where gradients of all units fit the budget.

        Raises:
            ConfigError: ``by_sequence`` or ``full_kernel`` was asked for, and gradients of all units do not fit the budget.
        """
        assert_grad_context("OnePassEngine.same_batch")
        share = self._sweeper.share(rollouts, self._context.estimate.blocks)
        if not self._resolves_itself(share):
            self._resolve(rollouts, rollouts)
        with contextlib.suppress(ScoresNeededError):
            return self._same_batch(share)
        # Memory ran out, and the batch goes through in parts after all; what the first try held is let go before.
        self._resolve(rollouts, rollouts)
        return self._same_batch(share)

    def _same_batch(self, share: Share) -> Measured:
        context, columns, rollouts = self._context, self._context.columns, share.rollouts
        for wanted in ("by_sequence", "by_token", "full_kernel"):
            if getattr(context.run, wanted):
                needed = self._sweeper.stack_bytes(share, columns)
                refuse_without_stack(wanted, needed, context.run.memory_bytes)
        table = self._table(rollouts, columns)
        totals, stack = self._sweeper.sums_of(share, columns, table)
        x_places, y_places = (columns.places_of(side) for side in Side)
        x_totals, g_totals = ([totals[place] for place in places] for places in (x_places, y_places))
        sums = finished(context, x_totals[0], g_totals[0], rollouts, rollouts)
        y_sums = self._y_sums(sums, g_totals, rollouts)
        products = products_of(context.layout, sums, x_totals, y_sums)
        if stack is None:
            along = along_sums(context, g_totals, rollouts, len(x_places), None)
            found = self._second_sweep(share, columns, x_totals, y_sums, products, along)
        else:
            x_stacks, y_stacks = ([stack.columns[place] for place in places] for places in (x_places, y_places))
            along = along_sums(context, g_totals, rollouts, len(x_places), y_stacks)
            numbers = context.layout.units(share)
            for own, y_stack in zip(along, y_stacks, strict=False):
                own.add(numbers, x_stacks, y_stack, share.sizes[numbers])
            met = met_by_unit(context, along, y_stacks[0], share)
            for y_stack in y_stacks:
                context.step.precondition_in_place(y_stack)
            kernels = kernels_of(share, x_stacks, y_stacks, context.layout)
            found = [
                [sums_of_kernel(*kernel, share.sizes, own) for kernel, own in zip(of_update, of_sums, strict=True)]
                for of_update, of_sums in zip(kernels, products, strict=True)
            ]
            found = with_rows(found, along, context.layout)
            met = met or less_own(sums.y, y_stacks[0])
            found[0] = one_batch_shares(context, self._sweeper.project, share, found[0], x_totals, x_stacks, met)
        return self._measured(found, sums, {side.value: table for side in Side}, along)

    def two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        """See `Engine.two_batch`: U first, then E with X_n · Y_sum in the same backward."""
        assert_grad_context("OnePassEngine.two_batch")
        entropy_share, update_share = (self._sweeper.share(batch, None) for batch in (entropy, update))
        self._resolve(
            None if self._resolves_itself(entropy_share, Side.FUNCTIONAL) else entropy,
            None if self._resolves_itself(update_share, Side.UPDATE) else update,
        )
        with contextlib.suppress(ScoresNeededError):
            return self._two_batch(entropy_share, update_share)
        self._resolve(entropy, update)
        return self._two_batch(entropy_share, update_share)

    def _two_batch(self, entropy_share: Share, update_share: Share) -> Measured:
        context, sweeper, layout = self._context, self._sweeper, self._context.layout
        entropy, update = entropy_share.rollouts, update_share.rollouts
        functional, updates = (context.columns.of_side(side) for side in Side)
        tables = {
            Side.FUNCTIONAL.value: self._table(entropy, functional),
            Side.UPDATE.value: self._table(update, updates),
        }
        g_totals, stack = sweeper.sums_of(update_share, updates, tables["update"])
        y_sums = [finish_update(context, total, update)[0] for total in g_totals]
        x_totals = [sweeper.empty_sum() for _ in functional]
        rows = torch.zeros(len(updates), len(functional), entropy.n_prompts, dtype=torch.float64)
        along = along_sums(context, g_totals, update, len(functional), None, entropy.n_prompts)
        names = context.kept.names

        def project_entropy(numbers: list[int], gradients: Sequence[Mapping[str, Tensor]]) -> None:
            stacks = stacks_of(gradients, names)
            for own in along:
                own.add(numbers, stacks, None, torch.ones(len(numbers)))
            for place, (of_units, x_total) in enumerate(zip(stacks, x_totals, strict=True)):
                for position, number in enumerate(numbers):
                    unit = unit_of(of_units, position)
                    for which, y_sum in enumerate(y_sums):
                        rows[which, place, number] += unit_dots(context, unit, unit, x_total, y_sum)[:, 1].sum()
            sweeper.add(x_totals, gradients)

        held = Held(
            {
                **{f"sum {place}": x_total for place, x_total in enumerate(x_totals)},
                **{f"along {which}": own for which, own in enumerate(along)},
                "rows": Tables({"rows": rows}),
            }
        )
        sweeper.sweep(entropy_share, functional, "entropy", project_entropy, held, tables["entropy"])
        sweeper.add_ranks(x_totals)
        entropy_share.fill(tables["entropy"].known)
        sums = finished(context, x_totals[0], g_totals[0], entropy, update)
        columns = torch.zeros(len(updates), len(functional), update.n_prompts, dtype=torch.float64)
        if stack is not None:
            for which, y_stack in enumerate(stack.columns):
                context.step.precondition_in_place(y_stack)
                for place, x_total in enumerate(x_totals):
                    own = kernel_of([x.unsqueeze(0) for x in x_total.tensors], y_stack)[0][0]
                    columns[which, place, layout.units(update_share)] = own
        else:

            def project_update(numbers: list[int], gradients: Sequence[Mapping[str, Tensor]]) -> None:
                for which, (of_units, y_sum) in enumerate(zip(stacks_of(gradients, names), y_sums, strict=True)):
                    for place, x_total in enumerate(x_totals):
                        for position, number in enumerate(numbers):
                            unit = unit_of(of_units, position)
                            found = unit_dots(context, unit, unit, x_total, y_sum)
                            columns[which, place, number] += found[:, 2].sum()

            held = Held({"columns": Tables({"columns": columns})})
            sweeper.sweep(update_share, updates, "projections", project_update, held)
        add_up(context.team, [rows, columns])
        found = [
            [
                KernelSums(float(own.sum()), by_row, by_column, by_parameter=own)
                for own, by_row, by_column in zip(*of_update, strict=True)
            ]
            for of_update in zip(products_of(layout, sums, x_totals, y_sums), rows, columns, strict=True)
        ]
        found = with_rows(found, along, layout)
        met = list(sums.y.tensors) if not along else steps_of_others(along[0].seen)
        shares = entropy_share, update_share
        found[0] = two_batch_shares(context, sweeper.project, *shares, found[0], x_totals, met)
        return self._measured(found, sums, tables, along)

    def _second_sweep(
        self,
        share: Share,
        columns: Columns,
        x_totals: Sequence[GradientSum],
        y_sums: Sequence[GradientSum],
        products: Sequence[Sequence[Tensor]],
        along: Sequence[AlongSums],
    ) -> list[list[KernelSums]]:
        """Diagonal, row and column sums of every pair of columns, from every unit's products with the sums."""
        context, names = self._context, self._context.kept.names
        sizes = share.sizes
        x_places, y_places = (columns.places_of(side) for side in Side)
        dots = torch.zeros(len(y_places), len(x_places), len(sizes), 3, dtype=torch.float64)
        diagonals = torch.zeros(len(names), len(y_places), len(x_places), dtype=torch.float64)

        def project(numbers: list[int], gradients: Sequence[Mapping[str, Tensor]]) -> None:
            stacks = stacks_of(gradients, names)
            for place, own in zip(y_places, along, strict=False):
                own.add(numbers, [stacks[x_place] for x_place in x_places], stacks[place], sizes[numbers])
            for position, number in enumerate(numbers):
                unit = [unit_of(stack, position) for stack in stacks]
                for which, (y_place, y_sum) in enumerate(zip(y_places, y_sums, strict=True)):
                    for index, (x_place, x_total) in enumerate(zip(x_places, x_totals, strict=True)):
                        dot = unit_dots(context, unit[x_place], unit[y_place], x_total, y_sum)
                        dots[which, index, number] = dot.sum(0)
                        diagonals[:, which, index].add_(dot[:, 0])

        held = Held({"products": Tables({"dots": dots, "diagonals": diagonals})})
        for which, own in enumerate(along):
            held = held.and_also(f"along {which}", own)
        # Products of two gradients of a unit are of no use before both are complete.
        self._sweeper.sweep(share, columns, "projections", project, held, together=True)
        add_up(context.team, [dots])
        diagonals = context.layout.complete(diagonals).permute(1, 2, 0)
        found = [
            [sums_of_dots(*own, sizes) for own in zip(*of_update, strict=True)]
            for of_update in zip(diagonals, dots, products, strict=True)
        ]
        return with_rows(found, along, context.layout)

    def _y_sums(self, sums: FinishedSums, totals: Sequence[GradientSum], rollouts: Rollouts) -> list[GradientSum]:
        """Y_sum of every update column; the first is there."""
        return [sums.y, *(finish_update(self._context, total, rollouts)[0] for total in totals[1:])]

    def _resolve(self, entropy: Rollouts | None, update: Rollouts | None) -> None:
        """Find what columns wait for."""
        self._context = resolved_context(self._context, entropy, update, self.score)

    def _resolves_itself(self, share: Share, side: Side | None = None) -> bool:
        """Whether one forward of the whole batch says what columns (of a side) wait for, so that none has to come before it."""
        context = self._context
        columns = context.columns if side is None else context.columns.of_side(side)
        return (
            context.scores is None
            and any(isinstance(column, ResolvedColumn) for column in columns)
            and self._sweeper.stack_bytes(share, context.columns) <= context.run.memory_bytes
            and not (context.run.by_sequence or context.run.by_token)
            and not self._sweeper.has_scores(share.rollouts)
            and self._sweeper.runs_whole(context, share)
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
        return self._sweeper.sums_of(self._sweeper.share(rollouts, None), updates, self._table(rollouts, updates))[0][0]

    def score(self, rollouts: Rollouts) -> TokenScores:
        """Log-probs and entropies of every response token of a batch, by forwards without a graph."""
        return self._sweeper.score(rollouts)

    def _measured(
        self,
        found: Sequence[Sequence[KernelSums]],
        sums: FinishedSums,
        tables: Mapping[str, SequenceTable],
        along: Sequence[AlongSums],
    ) -> Measured:
        note = self._sweeper.note
        if note is not None:
            warnings.warn(note, EntropyFastWarning, stacklevel=4)
        plan = self._sweeper.plan()
        notes = (*(() if note is None else (note,)), *self._context.keeper.notes)
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
