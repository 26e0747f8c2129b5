"""Every update's products along the optimizer's step; with a live gradient also of updates that would be taken instead.

Legend: L live gradient of the loss of B prompts, of which n were sampled; g_u ascent gradient of sampled prompt u in the update
that L is of, g'_u in another update, d_u = g'_u - g_u, D = Σ_u d_u; σ sign and factor with L = σ Σ g / B over all prompts;
X_u gradient of a functional, Δθ(L) the step, B - 1 and n - 1 without prompt u.

The gradient that the other update would have made is known where it is the same, and estimated from the sample where it
differs:

    L' = L + σ D / n

(with two batches n is B, and L' exact). Without the samples of prompt u, which X_u is made of too, that is

    L'_{-u} = (L - σ g_u / B) B / (B - 1) + σ (D - d_u) / (n - 1)
            = (L' - σ h_u / B) B / (B - 1)     with     h_u = g_u + B D / n - (B - 1)(D - d_u) / (n - 1)

so that h_u stands in for a prompt's own gradient. Where n = B it is g'_u.

How the forecast varies with the sampled d_u is

    y_u = (X_sum - X_u) · (Δθ(L') - Δθ(L' with D / n of the others)),

to first order in d_u the product of the others' mean X with σ (d_u - D / n) through the step (`estimates.terms`). With
several ranks sums over prompts are over those of all, parameter by parameter: D, and of a sample also X_sum and Σ (h - g).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.columns import Side
from entropy_fast.columns.given import GivenUpdate
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.collectives import add_up
from entropy_fast.distributed.layout import Layout
from entropy_fast.engines.along import ELEMENTS_AT_ONCE, AlongSums, SeenGradient, parts_changed, seen_gradient
from entropy_fast.engines.gradient_sum import GradientSum, row_products
from entropy_fast.engines.unit_dots import Stack
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.kernel_sums import KernelSums, SampledUpdate
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import prompt_units

__all__ = ["along_sums", "with_rows"]


def along_sums(
    context: ProbeContext,
    g_totals: Sequence[GradientSum],
    update: Rollouts,
    n_functionals: int,
    g_stacks: Sequence[Sequence[Tensor]] | None,
    n_units: int | None = None,
) -> list[AlongSums]:
    """Empty rows of every update column; none under ``adam_static``.

    Args:
        context: of the probe.
        g_totals: Σ g of every update column, raw.
        update: the update batch.
        n_functionals: functional columns.
        g_stacks: with one batch raw g of every unit and parameter; None where they are not kept. With a live gradient those of
            every column after the first become h.
        n_units: of the functional side; None for those of the update batch and the options' blocks.

    Raises:
        ConfigError: a live gradient, and every unit's own gradients are not kept.
        DistributedError: a rank was lost.
    """
    step = context.next_step
    if step is None:
        return []
    if n_units is None:
        n_units = len(prompt_units(update.n_prompts, context.estimate.blocks))
        if step.live is not None and g_stacks is None:
            raise ConfigError(
                "gradient='live' needs every sampled prompt's own gradients, and they do not fit memory_budget.",
                fix="sample fewer prompts (EstimateOptions(sample=...)), or pass a larger memory_budget.",
            )
    stacks = [None] * len(g_totals) if g_stacks is None else g_stacks
    prompts = context.prompts_of_batch or update.n_prompts
    exactly = isinstance(next(iter(context.columns.of_side(Side.UPDATE))), GivenUpdate)
    if step.live is None:
        return [
            AlongSums(
                seen_gradient(step, total, prompts, stack, exactly=exactly, layout=context.layout),
                n_functionals,
                n_units,
            )
            for total, stack in zip(g_totals, stacks, strict=True)
        ]
    planned = seen_gradient(step, g_totals[0], prompts, stacks[0], exactly=exactly, layout=context.layout)
    found = [AlongSums(planned, n_functionals, n_units)]
    for total, stack in zip(g_totals[1:], stacks[1:], strict=True):
        other = _other_gradient(planned, g_totals[0], total, update.n_prompts)
        sampled = None
        if stack is not None:
            assert stacks[0] is not None
            _put_stand_ins(context.layout, stacks[0], stack, n_units, prompts)
            sampled = stacks[0] if update.n_prompts < prompts else None
        found.append(OtherSums(other, n_functionals, n_units, sampled, context.layout))
    return found


def with_rows(
    found: Sequence[Sequence[KernelSums]], along: Sequence[AlongSums], layout: Layout
) -> list[list[KernelSums]]:
    """Sums by update and functional, with the rows of each update's whole step where there are any, of all ranks."""
    if not along:
        return [list(own) for own in found]
    for rows in along:
        rows.add_ranks(layout)
    return [rows.put(own) for rows, own in zip(along, found, strict=True)]


def _other_gradient(planned: SeenGradient, total: GradientSum, other: GradientSum, sampled: int) -> SeenGradient:
    """What the optimizer would have seen: L', from Σ g and Σ g' over the sample."""
    own = planned.own if planned.agreement is not None else _sign(planned) * planned.clip
    loss: list[Tensor | None] = []
    for live, mine, theirs in zip(planned.loss, total.tensors, other.tensors, strict=True):
        differs = (theirs - mine) * (own / sampled)
        if live is None:
            loss.append(differs if bool(differs.any()) else None)
        else:
            loss.append(live + differs.to(live))
    return dataclasses.replace(planned, loss=loss, own=own, agreement=None)


def _sign(seen: SeenGradient) -> float:
    return 1.0 if seen.step.ascends else -1.0


def _put_stand_ins(layout: Layout, planned: Sequence[Tensor], other: Sequence[Tensor], n: int, prompts: int) -> None:
    """Write h over the other update's g' of this rank's units, parameter by parameter; n units of all ranks."""
    for g, stack in zip(planned, other, strict=True):
        differences = stack - g
        total = differences.sum(0, keepdim=True)
        layout.add_units([total])
        stack.copy_(g + total * (prompts / n) - (total - differences) * ((prompts - 1) / (n - 1)))


class OtherSums(AlongSums):
    """Rows of an update that would be taken instead of the live one's.

    Args:
        seen: what the optimizer would see: L', with σ.
        n_columns: functional columns.
        n_units: how many.
        planned: raw g of the sampled prompts in the live update, of this rank's, where they are not all of the batch; None
            elsewhere, and L' is exact then.
        layout: what of the gradients this rank has.
    """

    def __init__(
        self, seen: SeenGradient, n_columns: int, n_units: int, planned: Sequence[Tensor] | None, layout: Layout
    ) -> None:
        super().__init__(seen, n_columns, n_units)
        self._planned, self._layout = planned, layout
        self._projections = [torch.zeros(n_units, dtype=torch.float64) for _ in range(n_columns)]

    def add(self, numbers: Sequence[int], x_stacks: Sequence[Stack], g_stack: Stack | None, sizes: Tensor) -> None:
        """See `AlongSums.add`; of a sample, all of this rank's prompts at once, and ``g_stack`` is h."""
        super().add(numbers, x_stacks, g_stack, sizes)
        if self._planned is None:
            return
        assert g_stack is not None and (self._layout.team.size > 1 or len(numbers) == len(self._projections[0]))
        for place, (g, h) in enumerate(zip(self._planned, g_stack, strict=True)):
            if self.seen.loss[place] is None or not self.seen.step.held[place]:
                continue
            x = [stack[place] for stack in x_stacks]
            assert h is not None and all(own is not None for own in x)  # they are kept for every parameter
            self._project(place, numbers, g, h, [own for own in x if own is not None])

    def add_ranks(self, layout: Layout) -> None:
        """See `AlongSums.add_ranks`."""
        super().add_ranks(layout)
        add_up(layout.team, self._projections)

    def put(self, sums: Sequence[KernelSums]) -> list[KernelSums]:
        """See `AlongSums.put`. Of the fresh gradient's kernel nothing is known: a part of it is no prompt's."""
        found = []
        for own, projections in zip(super().put(sums), self._projections, strict=True):
            assert own.along is not None
            unknown = torch.full_like(own.row_sums, torch.nan)
            share = 1.0 if self._planned is None else len(projections) / self.seen.prompts
            along = dataclasses.replace(own.along, sampled=SampledUpdate(projections, share))
            found.append(
                dataclasses.replace(
                    own,
                    x_dot_y=math.nan,
                    row_sums=unknown,
                    column_sums=None if own.column_sums is None else unknown,
                    diagonal=None if own.diagonal is None else unknown,
                    kernel=None,
                    by_parameter=None,
                    along=along,
                )
            )
        return found

    def _project(self, place: int, numbers: Sequence[int], g: Tensor, h: Tensor, x: Sequence[Tensor]) -> None:
        """Add one parameter's part of every y_u."""
        loss, seen = self.seen.loss[place], self.seen
        assert loss is not None
        flat = [own.reshape(len(own), -1) for own in x]
        mean, totals = (h - g).sum(0, keepdim=True), [own.sum(0) for own in flat]
        self._layout.add_units([mean, *totals])
        mean /= len(self._projections[0])
        whole = parts_changed(seen, place, loss.unsqueeze(0))
        at_once = max(1, ELEMENTS_AT_ONCE // max(1, g.shape[1:].numel()))
        for start in range(0, len(g), at_once):
            span = slice(start, start + at_once)
            # h_u - g_u differs from its mean by (B - 1) / (n - 1) times what d_u does from its own.
            shift = (h[span] - g[span] - mean) * (-seen.own / (seen.prompts - 1))
            moved = (whole - parts_changed(seen, place, loss.unsqueeze(0) + shift.to(loss))).reshape(len(shift), -1)
            for projections, own, total in zip(self._projections, flat, totals, strict=True):
                found = row_products(moved, total.to(moved.dtype)) - row_products(own[span], moved.to(own.dtype))
                projections[list(numbers[span])] += found
