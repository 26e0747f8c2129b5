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
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.one_pass.gradient_stack import GradientStack
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.kernel_sums import SequenceParts
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import prompt_units

__all__ = ["Project", "one_batch_parts", "refuse_without_stack", "two_batch_parts"]


class Project(Protocol):
    """Sweeps a batch of whole sequences."""

    def __call__(
        self, rollouts: Rollouts, units: list[list[int]], directions: Directions, labels: str, *, by_unit: bool
    ) -> Tensor:
        """``[N, K]`` c_i ∇S_i · V (label X) or a_i ∇S_i · V (Y) for K directions; fp64 on the CPU.

        Directions are the same for all units unless ``by_unit``.
        """


def refuse_without_stack(needed: int, budget: int) -> None:
    """Raise when the gradients of all units, ``needed`` bytes, are not kept within ``budget``.

    Raises:
        ConfigError: they are not.
    """
    if needed > budget:
        raise ConfigError(
            f"by_sequence takes every unit's own gradients out of the sums over all units; they take {needed} bytes and "
            f"memory_budget is {budget} bytes, so they are not kept.",
            fix=f"pass memory_budget={needed} (--memory-budget) or more, mode='blocks' (--blocks) with fewer units, or an "
            "independent entropy batch (--entropy-rollouts), whose estimate has no diagonal to take out.",
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
        components: what has been through the batch.
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

    return SequenceParts(*project(rollouts, units, of_others, "XY", by_unit=True).unbind(1))


def two_batch_parts(
    components: ProbeComponents,
    project: Project,
    entropy: Rollouts,
    update: Rollouts,
    x_sum: GradientSum,
    y_sum: GradientSum,
) -> SequenceParts:
    """Parts of X_sum · Y_sum; arguments as of `one_batch_parts`."""

    def along(rollouts: Rollouts, tensors: Sequence[Tensor], label: str) -> Tensor:
        direction = dict(zip(components.registry.names, tensors, strict=True))
        units = prompt_units(rollouts.n_prompts, None)
        return project(rollouts, units, lambda name, _: (direction[name],), label, by_unit=False)[:, 0]

    px_sum = components.preconditioner.apply_preconditioner(x_sum.tensors)
    return SequenceParts(along(entropy, y_sum.tensors, "X"), along(update, px_sum, "Y"))
