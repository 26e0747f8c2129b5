"""One unit's products with the sums: X_u · Y_u, X_u · Y_sum and Y_u · X_sum, from its raw gradients.

Legend: X_u gradient of unit u in a functional column, g_u raw in an update column, Y_u = P g_u.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.context import ProbeContext
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.ops import precondition_accumulate

__all__ = ["Stack", "stacks_of", "unit_dots", "unit_of"]

Stack = Sequence[Tensor | None]  # [units, *shape] per parameter; None where nothing arrived


def stacks_of(gradients: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> list[list[Tensor | None]]:
    """Gradients of a few units, by column and name: by column and parameter."""
    return [[units.get(name) for name in names] for units in gradients]


def unit_of(stack: Stack, position: int) -> list[Tensor | None]:
    """One of the units."""
    return [None if units is None else units[position] for units in stack]


def unit_dots(
    context: ProbeContext,
    x_unit: Stack,
    g_unit: Stack,
    x_sum: GradientSum,
    y_sum: GradientSum,
) -> Tensor:
    """``[parameters, 3]`` X_u · Y_u, X_u · Y_sum and Y_u · X_sum by parameter, fp64 on the CPU.

    Args:
        context: of the probe.
        x_unit: X_u, one tensor per parameter; None where nothing arrived.
        g_unit: g_u raw, likewise, at the same parameters.
        x_sum: X_sum.
        y_sum: Y_sum.
    """
    moments = context.step.second_moments(x_sum.tensors)
    there = [
        (place, x.to(x_sum.tensors[place].device), g.to(x_sum.tensors[place].device))
        for place, (x, g) in enumerate(zip(x_unit, g_unit, strict=True))
        if x is not None and g is not None
    ]
    chosen = [place for place, _, _ in there]
    dots = torch.zeros(len(x_unit), 3, dtype=torch.float64)
    dots[chosen] = precondition_accumulate(
        [x for _, x, _ in there],
        [g for _, _, g in there],
        [moments.tensors[place] for place in chosen],
        [x_sum.tensors[place] for place in chosen],
        [y_sum.tensors[place] for place in chosen],
        bias_correction=[moments.bias_correction[place] for place in chosen],
        eps=[moments.eps[place] for place in chosen],
        ratio=[moments.ratio[place] for place in chosen],
        update=False,
    ).cpu()
    return dots
