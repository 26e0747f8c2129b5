"""Every sequence's part in the kernel sums, from its gradient's products with the other units' sums.

Legend: S_i log-prob of sequence i of unit u, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, Y_u = P g_u.

With one batch, V_u = Y_sum - Y_u and W_u = P (X_sum - X_u): a unit's product with itself is left out. Over the sequences of a
unit, c_i ∇S_i · V_u adds up to X_u · Y_sum - X_u · Y_u, and a_i ∇S_i · W_u to Y_u · X_sum - X_u · Y_u. With two batches
V = Y_sum and W = P X_sum for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from entropy_fast.engines.capture import Directions
from entropy_fast.engines.gradient_stack import GradientStack
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.kernel_sums import SequenceParts
from entropy_fast.engines.units import prompt_units
from entropy_fast.errors import ConfigError
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts

__all__ = ["Project", "one_batch_parts", "refuse_without_stack", "two_batch_parts"]


class Project(Protocol):
    """Sweeps a batch of whole sequences."""

    def __call__(
        self, rollouts: Rollouts, units: list[list[int]], directions: Directions, count: int, *, by_unit: bool
    ) -> Tensor:
        """``[N, count]`` ∇S_i · V for ``count`` directions, the same for all units unless ``by_unit``; fp64 on the CPU."""


def refuse_without_stack(needed: int, budget: int) -> None:
    """Raise when the gradients of all units, ``needed`` bytes, are not kept within ``budget``.

    Raises:
        ConfigError: they are not.
    """
    if needed > budget:
        raise ConfigError(
            f"by_sequence takes every unit's own gradients out of the sums over all units; they take {needed} bytes and "
            f"memory_budget is {budget} bytes, so they are not kept.",
            fix=f"pass memory_budget={needed} or more, mode='blocks' with fewer units, or an independent entropy batch, whose "
            "estimate has no diagonal to take out.",
        )


def one_batch_parts(
    components: ProbeComponents,
    project: Project,
    rollouts: Rollouts,
    units: list[list[int]],
    x_sum: GradientSum,
    y_sum: GradientSum,
    stack: GradientStack,
) -> SequenceParts:
    """Parts of X_sum · Y_sum - Σ_u K_uu.

    Args:
        components: what has been through the batch; its tables have c_i and a_i.
        project: sweeps the batch.
        rollouts: the batch.
        units: prompts of every unit.
        x_sum: X_sum, raw.
        y_sum: Y_sum.
        stack: X_u, which becomes P X_u here, and Y_u.
    """
    names = components.registry.names
    px_sum = components.preconditioner.apply_preconditioner(x_sum.tensors)
    components.preconditioner.precondition_in_place(stack.entropy)
    place = {name: index for index, name in enumerate(names)}

    def of_others(name: str, unit: int) -> Sequence[Tensor]:
        index = place[name]
        return y_sum.tensors[index] - stack.update[index][unit], px_sum[index] - stack.entropy[index][unit]

    of_v, of_w = project(rollouts, units, of_others, 2, by_unit=True).unbind(1)
    table = components.sequences["X"]
    return SequenceParts(table.entropy * of_v, table.update * of_w)


def two_batch_parts(
    components: ProbeComponents,
    project: Project,
    entropy: Rollouts,
    update: Rollouts,
    x_sum: GradientSum,
    y_sum: GradientSum,
) -> SequenceParts:
    """Parts of X_sum · Y_sum; arguments as of `one_batch_parts`."""

    def along(rollouts: Rollouts, tensors: Sequence[Tensor]) -> Tensor:
        direction = dict(zip(components.registry.names, tensors, strict=True))
        units = prompt_units(rollouts.n_prompts, None)
        return project(rollouts, units, lambda name, _: (direction[name],), 1, by_unit=False)[:, 0]

    px_sum = components.preconditioner.apply_preconditioner(x_sum.tensors)
    of_v, of_w = along(entropy, y_sum.tensors), along(update, px_sum)
    return SequenceParts(components.sequences["X"].entropy * of_v, components.sequences["Y"].update * of_w)
