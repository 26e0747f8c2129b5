"""What the two-pass engine's passes give, and the kernel sums that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.columns import SequenceTable, Side
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.dealing import Share
from entropy_fast.engines.between_ranks import kernels_of
from entropy_fast.engines.gradient_sum import GradientSum, inner_product
from entropy_fast.engines.sums import FinishedSums, by_column
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured, Plan

__all__ = ["Pass", "kernel_between", "measured_of", "sums_of_dots"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """A gradient sum over a batch, and what was learned of its sequences."""

    total: GradientSum
    table: SequenceTable


def kernel_between(
    share: Share, kept: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], parameters: Sequence[Tensor]
) -> Tensor:
    """[units, units] K of all ranks' units, from X_u and Y_u on the CPU of those of this rank; fp64."""
    if share.team.size == 1:
        return torch.tensor([[inner_product(x, y) for _, y in kept] for x, _ in kept], dtype=torch.float64)
    wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
    stacks = [
        [
            torch.stack([own[which][place] for own in kept]) if kept else torch.zeros(0, *p.shape, dtype=dtype)
            for place, (p, dtype) in enumerate(zip(parameters, wide, strict=True))
        ]
        for which in range(2)
    ]
    return kernels_of(share, stacks[:1], stacks[1:])[0][0][0]


def measured_of(
    context: ProbeContext,
    found: Sequence[Sequence[KernelSums]],
    sums: FinishedSums,
    passes: tuple[Pass, Pass],
    then: str,
) -> Measured:
    """From sums by update and functional, what the passes of X and of Y learned, and what came after them in words."""
    first, apart, candidates = by_column(context.columns, found)
    per_forward = context.run.prompts_per_microbatch or 1
    dealt = f", prompts dealt to {context.team.size} ranks" if context.team.size > 1 else ""
    plan = Plan(
        f"padded whole sequences, {per_forward} prompt(s) in a forward{dealt}, one forward and backward for the entropy "
        f"gradient and one for the update's; {then}",
        reasons=("the plain reference that faster engines are checked against",),
    )
    return Measured(
        first,
        sums.coverage,
        {side.value: own.table for side, own in zip(Side, passes, strict=True)},
        sums.excluded,
        sums.leading_products,
        plan,
        context.keeper.notes,
        apart=apart,
        candidates=candidates,
    )


def sums_of_dots(of_units: Tensor, products: Tensor, sizes: Tensor) -> KernelSums:
    """From [units, parameters, 3] X_u · Y_u, X_u · Y_sum and Y_u · X_sum, and X_sum · Y_sum by parameter."""
    diagonal, row_sums, column_sums = (part.contiguous() for part in of_units.sum(1).unbind(1))
    by_parameter = products - of_units[:, :, 0].sum(0)
    return KernelSums(float(products.sum()), row_sums, column_sums, diagonal, sizes, by_parameter=by_parameter)
