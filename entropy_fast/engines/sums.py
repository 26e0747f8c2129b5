"""From gradient sums to what a result needs of them, the same for every engine.

Legend: X_sum = Σ_n X_n raw, g_sum = Σ_n g_n raw, Y_sum = P g_sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from entropy_fast.checks.coverage import PassCoverage, reached_by, require_gradients, warn_if_coverage_differs
from entropy_fast.columns import Columns, Side
from entropy_fast.context import ProbeContext
from entropy_fast.engines.gradient_sum import GradientSum, parameter_products
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import UpdateSums
from entropy_fast.rollouts import Rollouts
from entropy_fast.step import ExcludedElements
from entropy_fast.step.preconditioner import check_excluded

__all__ = ["FinishedSums", "by_column", "finish_functional", "finish_update", "finished"]

LEADING_PARAMETERS = 5  # how many per-parameter products X·Y the diagnostics show


@dataclasses.dataclass(frozen=True)
class FinishedSums:
    """X_sum and Y_sum, checked, and their products.

    Attributes:
        x: X_sum, raw.
        y: Y_sum.
        coverage: by side.
        excluded: what of g_sum has no second moment.
        products: [parameters] X_sum · Y_sum by parameter, fp64 on the CPU.
        leading_products: the first few, by name.
    """

    x: GradientSum
    y: GradientSum
    coverage: dict[str, PassCoverage]
    excluded: ExcludedElements
    products: Tensor
    leading_products: dict[str, float]


def finish_functional(
    context: ProbeContext, total: GradientSum, rollouts: Rollouts
) -> tuple[GradientSum, PassCoverage]:
    """X_sum, and what it reached.

    Raises:
        GradientCoverageError: no parameter received a gradient (or, strict, one did not).
    """
    return total, coverage_of(context, Side.FUNCTIONAL, total, rollouts)


def finish_update(
    context: ProbeContext, total: GradientSum, rollouts: Rollouts
) -> tuple[GradientSum, PassCoverage, ExcludedElements]:
    """Y_sum from g_sum, what it reached, and what has no second moment.

    Raises:
        GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
    """
    coverage = coverage_of(context, Side.UPDATE, total, rollouts)
    excluded = context.step.excluded(total.tensors, context.layout.add_parameters)
    if context.next_step is None:
        # In the optimizer's own next step these elements move too.
        check_excluded(excluded, context.run.max_excluded_share)
    return GradientSum(context.step.apply_preconditioner(total.tensors), total.touched), coverage, excluded


def finished(
    context: ProbeContext, x_total: GradientSum, g_total: GradientSum, entropy: Rollouts, update: Rollouts
) -> FinishedSums:
    """Both, and their products by parameter.

    Raises:
        GradientCoverageError: see `finish_functional` and `finish_update`.
    """
    x, x_coverage = finish_functional(context, x_total, entropy)
    y, y_coverage, excluded = finish_update(context, g_total, update)
    warn_if_coverage_differs(x_coverage, y_coverage)
    products = context.layout.of_all_parameters(parameter_products(x, y))
    leading = dict(zip(context.registry.names[:LEADING_PARAMETERS], products.tolist(), strict=False))
    coverage = {Side.FUNCTIONAL.value: x_coverage, Side.UPDATE.value: y_coverage}
    return FinishedSums(x, y, coverage, excluded, products, leading)


def by_column(
    columns: Columns, found: Sequence[Sequence[KernelSums]]
) -> tuple[KernelSums, dict[str, KernelSums], dict[str, UpdateSums]]:
    """Sums by update and functional, in the order of the columns, as `Measured` has them: of the first, and the others."""
    functionals, updates = ([column.name for column in columns.of_side(side)] for side in Side)
    named = [UpdateSums(own[0], dict(zip(functionals[1:], own[1:], strict=True))) for own in found]
    return named[0].sums, dict(named[0].apart), dict(zip(updates[1:], named[1:], strict=True))


def coverage_of(context: ProbeContext, side: Side, total: GradientSum, rollouts: Rollouts) -> PassCoverage:
    """What a sum reached.

    Raises:
        GradientCoverageError: nothing (or, strict, not everything).
    """
    lengths = rollouts.response_lengths.double()
    reached = context.layout.of_all_parameters(reached_by(total.tensors, total.touched))
    found = PassCoverage.of(side.value, reached, context.registry.names, float(lengths.mean()))
    require_gradients(found, strict=context.run.strict, cause=context.likely_cause)
    return found
