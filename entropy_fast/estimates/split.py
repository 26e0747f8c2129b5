"""δH₁ in two parts: what changes at the prefixes that are visited, and which prefixes are visited.

Legend: X_n = X_n^direct + X_n^visitation of prompt n, X^direct = Σ_t e_t ∇H_t, X^visitation = Σ_t c_t ∇s_t (docs/theory.md);
Y_m = P g_m, B prompts, lr the learning rate.
"""

from __future__ import annotations

import dataclasses
import math

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured
from entropy_fast.estimates.two_batch import two_batch_estimate
from entropy_fast.estimates.u_statistic import u_estimate

__all__ = ["Split", "forecast_of", "other_forecasts", "split_of"]

DIRECT = "direct"


@dataclasses.dataclass(frozen=True)
class Split:
    """The parts of δH₁; ``direct.value + visitation.value`` is ``total.value``.

    Attributes:
        total: both together.
        direct: how the distributions change at the prefixes that were visited.
        visitation: how often prefixes are visited.
        on_batch: derivative along the step of this very entropy batch's mean entropy at its fixed prefixes: the direct part
            with every prompt's own product left in. It has no sampling error; a re-scoring of the same rollouts after a small
            step gives it again.
    """

    total: Forecast
    direct: Forecast
    visitation: Forecast
    on_batch: float


def forecast_of(sums: KernelSums, learning_rate: float, n_update: int) -> Forecast:
    """From sums over the influence kernel of one batch, or of two.

    Args:
        sums: over units.
        learning_rate: lr.
        n_update: prompts of the update batch.
    """
    errors: tuple[float | None, float | None]
    if sums.diagonal is not None:
        assert sums.column_sums is not None
        same = u_estimate(sums.x_dot_y, sums.diagonal, sums.row_sums, sums.column_sums, sums.unit_sizes, sums.kernel)
        value, errors, shares = same.value, (same.se_given_update, same.se_jackknife), same.contributions
    else:
        two = two_batch_estimate(sums.x_dot_y, sums.row_sums, sums.column_sums, n_update)
        value, errors, shares = two.value, (two.se_conditional, two.se_total), two.projections / len(sums.row_sums)
    this, population = (math.nan if error is None else learning_rate * error for error in errors)
    return Forecast(learning_rate * value, this, population, len(sums.row_sums), learning_rate * shares)


def split_of(measured: Measured, learning_rate: float, n_entropy: int, n_update: int) -> Split | None:
    """The split; None where the engine was not asked for the direct part.

    Args:
        measured: what the engine found.
        learning_rate: lr.
        n_entropy: prompts of the entropy batch.
        n_update: prompts of the update batch.
    """
    direct = measured.apart.get(DIRECT)
    if direct is None:
        return None
    total, part, rest = (
        forecast_of(sums, learning_rate, n_update) for sums in (measured.sums, direct, measured.sums.less(direct))
    )
    return Split(total, part, rest, learning_rate * direct.x_dot_y / (n_entropy * n_update))


def other_forecasts(measured: Measured, learning_rate: float, n_update: int) -> dict[str, Forecast]:
    """Of the functionals that are no part of the entropy, by name."""
    return {name: forecast_of(sums, learning_rate, n_update) for name, sums in measured.apart.items() if name != DIRECT}
