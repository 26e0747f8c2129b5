"""What a forecast is a sum of, each with what a standard error of the sum needs.

Legend: M units of sizes |b|, B prompts; with one batch U the U-statistic of the kernel, r_b = X_b · Δθ_{-b} a row along a part
of the optimizer's step, whose mean Σ_b r_b / B is that part's forecast. Of an update that is known from a share f of its batch,
y_b what unit b's update does to the others beyond the sample's mean.

The delete-one values of terms add up, so the jackknife of a sum is that of the sum of theirs. A part that does not depend on
the batch's samples (momentum, decay) has rows alone: the average over such updates is no less certain than this one. How the
step's scale varies from batch to batch is not in the error for such updates; and where the fresh gradient is measured along the
step (a live one, or an optimizer whose step has no linear part) that error is not known.

A step that was made from M of B sampled prompts varies with them too. The forecast less what it estimates is, to first order,
the sample's mean of r + (1 - f) y less (1 - f) times the mean of y over the prompts that were not sampled, whose variance is

    [Var(r + (1 - f) y) + f (1 - f) Var(y)] / M.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.estimates.intervals import degrees_of_freedom, largest_share
from entropy_fast.estimates.kernel_sums import KernelSums, SampledUpdate
from entropy_fast.estimates.two_batch import two_batch_estimate
from entropy_fast.estimates.u_statistic import jackknife, u_estimate

__all__ = ["FRESH", "SAMPLED", "Errors", "Term", "errors_of", "terms_of"]

FRESH, SAMPLED = "fresh", "sampled"


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of a forecast.

    Attributes:
        value: in the unit of the forecast.
        shares: [M] of units as those whose numbers change, adding up to it; with one batch and Adam's static geometry the mean
            of these and of those by whose update does it.
        kept_rows: [M] the value with each unit's row left out; None where there are too few.
        kept_units: with one batch, [M] the value with each unit left out in both roles; None likewise.
        update_variance: with two batches, the variance that the update batch adds; None where it is not known.
        unsampled_variance: what prompts of the update's own batch add that were not sampled.
    """

    value: float
    shares: Tensor
    kept_rows: Tensor | None
    kept_units: Tensor | None
    update_variance: float | None = 0.0
    unsampled_variance: float = 0.0

    def negative(self) -> Term:
        """Of what is taken off."""
        kept_rows, kept_units = (None if own is None else -own for own in (self.kept_rows, self.kept_units))
        # An update batch's part is not independent of that which it is taken off from.
        varies = None if self.update_variance else self.update_variance
        return dataclasses.replace(
            self,
            value=-self.value,
            shares=-self.shares,
            kept_rows=kept_rows,
            kept_units=kept_units,
            update_variance=varies,
        )


def terms_of(sums: KernelSums, learning_rate: float, n_update: int) -> Mapping[str, Term]:
    """By part of the step; under ``adam_static`` there is one, the fresh gradient's.

    Args:
        sums: of a functional and an update.
        learning_rate: lr.
        n_update: prompts of the update batch.
    """
    found: dict[str, Term] = {}
    along = {} if sums.along is None else sums.along.rows
    if FRESH not in along:
        found[FRESH] = _of_kernel(sums, learning_rate * sums.clip, n_update)
    sizes = torch.ones(len(sums.row_sums)) if sums.unit_sizes is None else sums.unit_sizes
    least = 2 if sums.diagonal is None else 3
    for part, by_parameter in along.items():
        rows = by_parameter.sum(0)
        prompts = float(sizes.sum())
        kept = None
        if len(rows) >= least:
            kept = (rows.sum() - rows) / (prompts - sizes.double())
        # Of a fresh gradient that is not in the kernel nothing is known of other batches'.
        own = part == FRESH
        found[part] = Term(
            float(rows.sum()) / prompts, rows / prompts, kept, None if own else kept, None if own else 0.0
        )
    sampled = None if sums.along is None else sums.along.sampled
    if sampled is not None and sampled.share < 1:
        found[SAMPLED] = _of_sample(sampled)
    return found


def _of_sample(sampled: SampledUpdate) -> Term:
    """Adds nothing to a forecast but its error."""
    y, f, count = sampled.projections, sampled.share, len(sampled.projections)
    weighed = (1 - f) * y
    kept = (weighed.sum() - weighed) / (count - 1)
    unsampled = f * (1 - f) * float(y.var()) / count
    return Term(0.0, torch.zeros_like(y), kept, None, None, unsampled)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of a sum of terms; NaN where they are not defined. Fields as of `Forecast`."""

    std_error: float
    population_std_error: float
    degrees: float | None
    population_degrees: float | None
    largest_share: float


def errors_of(terms: Sequence[Term], *, one_batch: bool) -> Errors:
    """Standard errors of a sum of terms, for this update and for such updates, and how far each is to be trusted."""
    kept = _summed([term.kept_rows for term in terms])
    this, degrees, _ = _of_kept(kept)
    this = math.sqrt(this * this + sum(term.unsampled_variance for term in terms))
    if one_batch:
        population, population_degrees, share = _of_kept(_summed([term.kept_units for term in terms]))
        return Errors(this, population, degrees, population_degrees, share)
    variances = [term.update_variance for term in terms if term.update_variance is not None]
    population = math.sqrt(this * this + sum(variances)) if len(variances) == len(terms) else math.nan
    return Errors(this, population, degrees, degrees, math.nan)


def _summed(kept: Sequence[Tensor | None]) -> Tensor | None:
    known = [values for values in kept if values is not None]
    return torch.stack(known).sum(0) if len(known) == len(kept) else None


def _of_kept(kept: Tensor | None) -> tuple[float, float | None, float]:
    """Standard error, degrees of freedom and the largest share of the variance, from delete-one values."""
    if kept is None:
        return math.nan, None, math.nan
    # Pseudo-values but for a constant, which none of the three depends on.
    rows = -(len(kept) - 1) * kept
    return jackknife(kept), float(degrees_of_freedom(rows)), float(largest_share(rows))


def _of_kernel(sums: KernelSums, lr: float, n_update: int) -> Term:
    if sums.diagonal is None:
        two = two_batch_estimate(sums.x_dot_y, sums.row_sums, sums.column_sums, n_update)
        kept = None
        if len(two.projections) >= 2:
            kept = lr * (two.projections.sum() - two.projections) / (len(two.projections) - 1)
        v_y = None if two.v_y is None else lr * lr * two.v_y
        return Term(lr * two.value, lr * two.projections / len(sums.row_sums), kept, None, v_y)
    assert sums.column_sums is not None
    same = u_estimate(sums.x_dot_y, sums.diagonal, sums.row_sums, sums.column_sums, sums.unit_sizes, sums.kernel)
    shares = same.contributions if sums.along is None else same.as_entropy
    kept_rows, kept_units = (None if kept is None else lr * kept for kept in (same.kept_rows, same.kept_units))
    return Term(lr * same.value, lr * shares, kept_rows, kept_units)
