"""Every sequence's part in the kernel sums, from its gradient's products with the other units' sums.

Legend: S_i log-prob of sequence i of unit u, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, Y_u = P g_u.

With one batch, V_u = Y_sum - Y_u and W_u = P (X_sum - X_u): a unit's product with itself is left out. Over the sequences of
a unit, c_i ∇S_i · V_u adds up to X_u · Y_sum - X_u · Y_u, and a_i ∇S_i · W_u to Y_u · X_sum - X_u · Y_u. With two batches V
= Y_sum and W = P X_sum for all. Where coefficients differ from token to token, Σ_t c_t ∇s_t + e_t ∇H_t and Σ_t a_t ∇s_t
stand in the place of c_i ∇S_i and a_i ∇S_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from entropy_fast.capture import Directions
from entropy_fast.columns import Column, Columns, Side
from entropy_fast.context import ProbeContext
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.kernel_sums import SequenceParts
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import prompt_units

__all__ = ["Project", "one_batch_parts", "refuse_without_stack", "two_batch_parts"]


class Project(Protocol):
    """Sweeps a batch of whole sequences."""

    def __call__(
        self, rollouts: Rollouts, units: list[list[int]], directions: Directions, columns: Columns, *, by_unit: bool
    ) -> Tensor:
        """``[N, C]`` w_ci ∇S_i · V_c for a direction a column; fp64 on the CPU.

        Directions are the same for all units unless ``by_unit``.
        """


def refuse_without_stack(option: str, needed: int, budget: int) -> None:
    """Raise when the gradients of all units, ``needed`` bytes, are not kept within ``budget``.

    Raises:
        ConfigError: they are not; the message names the option that needs them.
    """
    if needed > budget:
        raise ConfigError(
            f"{option} needs every unit's own gradients beside their sums; they take {needed} bytes and memory_budget is "
            f"{budget} bytes, so they are not kept.",
            fix=f"pass memory_budget={needed} (--memory-budget) or more, fewer units by blocks (--blocks), or an "
            "independent entropy batch (--entropy-rollouts), whose estimate has no diagonal to take out.",
        )


def one_batch_parts(
    context: ProbeContext,
    project: Project,
    rollouts: Rollouts,
    units: list[list[int]],
    x_totals: Sequence[GradientSum],
    y_sum: GradientSum,
    stacks: tuple[Sequence[Sequence[Tensor]], Sequence[Tensor]],
) -> list[SequenceParts]:
    """Parts of X_sum · Y_sum - Σ_u K_uu, of every functional column.

    Args:
        context: of the probe.
        project: sweeps the batch.
        rollouts: the batch.
        units: prompts of every unit.
        x_totals: X_sum of every functional column.
        y_sum: Y_sum of the update.
        stacks: X_u of every functional column, which become P X_u here, and Y_u.
    """
    x_stacks, y_stack = stacks
    px_sums = [context.step.apply_preconditioner(total.tensors) for total in x_totals]
    for x_stack in x_stacks:
        context.step.precondition_in_place(x_stack)
    place = {name: index for index, name in enumerate(context.registry.names)}

    def of_others(name: str, unit: int) -> Sequence[Tensor]:
        index = place[name]
        y = y_sum.tensors[index] - y_stack[index][unit]
        return [y] * len(x_stacks) + [px[index] - x[index][unit] for px, x in zip(px_sums, x_stacks, strict=True)]

    # The update's column once for every functional that it meets; they share a backward where coefficients are by sequence.
    columns = Columns((*context.columns.of_side(Side.FUNCTIONAL), *[_update(context)] * len(x_stacks)))
    parts = project(rollouts, units, of_others, columns, by_unit=True)
    return _pairs(parts[:, : len(x_stacks)], parts[:, len(x_stacks) :])


def two_batch_parts(
    context: ProbeContext,
    project: Project,
    entropy: Rollouts,
    update: Rollouts,
    x_totals: Sequence[GradientSum],
    y_sum: GradientSum,
) -> list[SequenceParts]:
    """Parts of X_sum · Y_sum; arguments as of `one_batch_parts`."""
    names, functionals = context.registry.names, context.columns.of_side(Side.FUNCTIONAL)

    def along(rollouts: Rollouts, directions: Sequence[Sequence[Tensor]], columns: Columns) -> Tensor:
        by_name = dict(zip(names, zip(*directions, strict=True), strict=True))
        units = prompt_units(rollouts.n_prompts, None)
        return project(rollouts, units, lambda name, _: by_name[name], columns, by_unit=False)

    px_sums = [context.step.apply_preconditioner(total.tensors) for total in x_totals]
    as_entropy = along(entropy, [y_sum.tensors] * len(x_totals), functionals)
    return _pairs(as_entropy, along(update, px_sums, Columns((_update(context),) * len(x_totals))))


def _pairs(as_entropy: Tensor, as_update: Tensor) -> list[SequenceParts]:
    return [SequenceParts(x.contiguous(), y.contiguous()) for x, y in zip(as_entropy.T, as_update.T, strict=True)]


def _update(context: ProbeContext) -> Column:
    return context.columns.of_side(Side.UPDATE).members[0]
