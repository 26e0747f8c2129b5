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
from entropy_fast.columns import Columns, Side
from entropy_fast.context import ProbeContext
from entropy_fast.engines.sums import FinishedSums
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
    sums: FinishedSums,
    stacks: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> SequenceParts:
    """Parts of X_sum · Y_sum - Σ_u K_uu.

    Args:
        context: of the probe.
        project: sweeps the batch.
        rollouts: the batch.
        units: prompts of every unit.
        sums: X_sum and Y_sum.
        stacks: X_u, which become P X_u here, and Y_u.
    """
    x_stack, y_stack = stacks
    px_sum = context.step.apply_preconditioner(sums.x.tensors)
    context.step.precondition_in_place(x_stack)
    place = {name: index for index, name in enumerate(context.registry.names)}
    columns = _two_columns(context)
    x_first = columns.places_of(Side.FUNCTIONAL)[0] == 0

    def of_others(name: str, unit: int) -> Sequence[Tensor]:
        index = place[name]
        meets = sums.y.tensors[index] - y_stack[index][unit], px_sum[index] - x_stack[index][unit]
        return meets if x_first else meets[::-1]

    parts = project(rollouts, units, of_others, columns, by_unit=True)
    (x_place,), (y_place,) = (columns.places_of(side) for side in Side)
    return SequenceParts(parts[:, x_place].contiguous(), parts[:, y_place].contiguous())


def two_batch_parts(
    context: ProbeContext, project: Project, entropy: Rollouts, update: Rollouts, sums: FinishedSums
) -> SequenceParts:
    """Parts of X_sum · Y_sum; arguments as of `one_batch_parts`."""

    def along(rollouts: Rollouts, tensors: Sequence[Tensor], side: Side) -> Tensor:
        direction = dict(zip(context.registry.names, tensors, strict=True))
        units = prompt_units(rollouts.n_prompts, None)
        columns = _two_columns(context).of_side(side)
        return project(rollouts, units, lambda name, _: (direction[name],), columns, by_unit=False)[:, 0]

    px_sum = context.step.apply_preconditioner(sums.x.tensors)
    return SequenceParts(along(entropy, sums.y.tensors, Side.FUNCTIONAL), along(update, px_sum, Side.UPDATE))


def _two_columns(context: ProbeContext) -> Columns:
    """The functional whose change is forecast, and the update, in the order in which they stand."""
    apart = list(context.columns.of_side(Side.FUNCTIONAL))[1:]
    return Columns(tuple(column for column in context.columns if column not in apart))
