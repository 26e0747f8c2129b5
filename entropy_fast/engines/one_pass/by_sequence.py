"""Every sequence's part in the kernel sums, from its gradient's products with the other units' sums.

Legend: S_i log-prob of sequence i of unit u, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, Y_u = P g_u.

With one batch, V_u = Y_sum - Y_u (or the optimizer's whole step by the other units) and
W_u = P (X_sum - X_u): a unit's product with itself is left out. Over the sequences of
a unit, c_i ∇S_i · V_u adds up to X_u · Y_sum - X_u · Y_u, and a_i ∇S_i · W_u to Y_u · X_sum - X_u · Y_u. With two batches V
= Y_sum and W = P X_sum for all. Where coefficients differ from token to token, Σ_t c_t ∇s_t + e_t ∇H_t and Σ_t a_t ∇s_t
stand in the place of c_i ∇S_i and a_i ∇S_i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from entropy_fast.capture import Directions
from entropy_fast.columns import Column, Columns, Side
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.dealing import Share
from entropy_fast.engines.along import AlongSums, step_of_others
from entropy_fast.engines.forward_mode.token_parts import parts_by_unit
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.kernel_sums import KernelSums, SequenceParts

__all__ = [
    "Met",
    "Project",
    "less_own",
    "met_by_unit",
    "one_batch_shares",
    "refuse_without_stack",
    "two_batch_shares",
]

Met = Callable[[int, int], Tensor]  # by place of a parameter and number of a unit, what the unit's gradient meets


def less_own(y_sum: GradientSum, y_stack: Sequence[Tensor]) -> Met:
    """Y_sum - Y_u."""
    return lambda place, unit: y_sum.tensors[place] - y_stack[place][unit]


def met_by_unit(
    context: ProbeContext, along: Sequence[AlongSums], g_stack: Sequence[Tensor], share: Share
) -> Met | None:
    """The first update's step by the other units, where shares of sequences or tokens along it are asked for; else None.

    It keeps a copy of the raw gradients ``g_stack`` of this rank's units, which become P g afterwards.

    Raises:
        ConfigError: units are of several sizes.
    """
    if not along or not (context.run.by_sequence or context.run.by_token):
        return None
    sizes = share.sizes
    if len(set(sizes.tolist())) > 1:
        raise ConfigError(
            f"by_sequence and by_token along the whole next step with blocks of {sorted(set(sizes.tolist()))} prompts: shares "
            "of unequal blocks do not add up.",
            fix="pass a number of blocks that divides the prompts, or step='adam_static'.",
        )
    kept, seen = [g.clone() for g in g_stack], along[0].seen
    return lambda place, unit: step_of_others(seen, place, kept[place][unit], int(sizes[0]))


class Project(Protocol):
    """Sweeps a batch of whole sequences."""

    def __call__(self, share: Share, directions: Directions, columns: Columns, *, by_unit: bool) -> Tensor:
        """``[N, C]`` w_ci ∇S_i · V_c for a direction a column; fp64 on the CPU.

        Directions are the same for all units unless ``by_unit``; then they are known by a unit's place among this rank's.
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


def one_batch_shares(
    context: ProbeContext,
    project: Project,
    share: Share,
    found: Sequence[KernelSums],
    x_totals: Sequence[GradientSum],
    x_stacks: Sequence[Sequence[Tensor]],
    met: Met,
) -> list[KernelSums]:
    """Sums of every functional column with the shares of tokens and sequences that are asked for.

    Args:
        context: of the probe.
        project: sweeps the batch.
        share: its units.
        found: the sums.
        x_totals: X_sum of every functional column.
        x_stacks: X_u of every functional column, of this rank's units, which may become P X_u here.
        met: V_u, by a unit's place among this rank's.
    """
    with_shares = list(found)
    if context.run.by_token:
        places = range(len(context.registry.tensors))
        tables = parts_by_unit(context, share, lambda u: [met(place, u) for place in places])
        with_shares = [dataclasses.replace(own, by_token=part) for own, part in zip(with_shares, tables, strict=True)]
    if context.run.by_sequence:
        parts = _one_batch_parts(context, project, share, x_totals, x_stacks, met)
        with_shares = [dataclasses.replace(own, by_sequence=part) for own, part in zip(with_shares, parts, strict=True)]
    return with_shares


def two_batch_shares(
    context: ProbeContext,
    project: Project,
    entropy: Share,
    update: Share,
    found: Sequence[KernelSums],
    x_totals: Sequence[GradientSum],
    met: Sequence[Tensor],
) -> list[KernelSums]:
    """Likewise with two batches; ``met`` is what every prompt meets."""
    with_shares = list(found)
    if context.run.by_token:
        tables = parts_by_unit(context, entropy, lambda _: [own.clone() for own in met])
        with_shares = [dataclasses.replace(own, by_token=part) for own, part in zip(with_shares, tables, strict=True)]
    if context.run.by_sequence:
        parts = _two_batch_parts(context, project, entropy, update, x_totals, met)
        with_shares = [dataclasses.replace(own, by_sequence=part) for own, part in zip(with_shares, parts, strict=True)]
    return with_shares


def _one_batch_parts(
    context: ProbeContext,
    project: Project,
    share: Share,
    x_totals: Sequence[GradientSum],
    x_stacks: Sequence[Sequence[Tensor]],
    met: Met,
) -> list[SequenceParts]:
    """Parts of Σ_u X_u · V_u and, as update, of X_sum · Y_sum - Σ_u K_uu, of every functional column.

    Args:
        context: of the probe.
        project: sweeps the batch.
        share: its units.
        x_totals: X_sum of every functional column.
        x_stacks: X_u of every functional column, which become P X_u here.
        met: V_u.
    """
    px_sums = [context.step.apply_preconditioner(total.tensors) for total in x_totals]
    for x_stack in x_stacks:
        context.step.precondition_in_place(x_stack)
    place = {name: index for index, name in enumerate(context.registry.names)}

    def of_others(name: str, unit: int) -> Sequence[Tensor]:
        index = place[name]
        return [met(index, unit)] * len(x_stacks) + [
            px[index] - x[index][unit] for px, x in zip(px_sums, x_stacks, strict=True)
        ]

    # The update's column once for every functional that it meets; they share a backward where coefficients are by sequence.
    columns = Columns((*context.columns.of_side(Side.FUNCTIONAL), *[_update(context)] * len(x_stacks)))
    parts = project(share, of_others, columns, by_unit=True)
    return _pairs(parts[:, : len(x_stacks)], parts[:, len(x_stacks) :])


def _two_batch_parts(
    context: ProbeContext,
    project: Project,
    entropy: Share,
    update: Share,
    x_totals: Sequence[GradientSum],
    met: Sequence[Tensor],
) -> list[SequenceParts]:
    """Parts of X_sum · V, V what every prompt meets, and as update of X_sum · Y_sum; arguments as of `_one_batch_parts`."""
    names, functionals = context.registry.names, context.columns.of_side(Side.FUNCTIONAL)

    def along(share: Share, directions: Sequence[Sequence[Tensor]], columns: Columns) -> Tensor:
        by_name = dict(zip(names, zip(*directions, strict=True), strict=True))
        return project(share, lambda name, _: by_name[name], columns, by_unit=False)

    px_sums = [context.step.apply_preconditioner(total.tensors) for total in x_totals]
    as_entropy = along(entropy, [met] * len(x_totals), functionals)
    return _pairs(as_entropy, along(update, px_sums, Columns((_update(context),) * len(x_totals))))


def _pairs(as_entropy: Tensor, as_update: Tensor) -> list[SequenceParts]:
    return [SequenceParts(x.contiguous(), y.contiguous()) for x, y in zip(as_entropy.T, as_update.T, strict=True)]


def _update(context: ProbeContext) -> Column:
    return context.columns.of_side(Side.UPDATE).members[0]
