"""Forecasts from sums over influence kernels: of δH₁ and its two parts, and of everything else that was asked for.

Legend: X_n = X_n^direct + X_n^visitation of prompt n, X^direct = Σ_t e_t ∇H_t, X^visitation = Σ_t c_t ∇s_t (docs/theory.md);
Y_m = P g_m, B prompts, lr the learning rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from entropy_fast.config import Part
from entropy_fast.estimates.attribution import Role, SequenceContributions, by_parameter, sequence_contributions
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import UpdateSums
from entropy_fast.estimates.two_batch import two_batch_estimate
from entropy_fast.estimates.u_statistic import u_estimate
from entropy_fast.rollouts import EmptyResponseReport

__all__ = ["Scale", "Split", "UpdateForecasts", "forecast_of", "forecasts_of"]

DIRECT = "direct"


@dataclasses.dataclass(frozen=True)
class Split:
    """The parts of δH₁; ``direct.value + visitation.value`` is ``total.value``.

    Attributes:
        total: both together; NaN where the direct part alone was asked for.
        direct: how the distributions change at the prefixes that were visited.
        visitation: how often prefixes are visited; NaN likewise.
        on_batch: derivative along the step of this very entropy batch's mean entropy at its fixed prefixes: the direct part
            with every prompt's own product left in. It has no sampling error; a re-scoring of the same rollouts after a small
            step gives it again.
    """

    total: Forecast
    direct: Forecast
    visitation: Forecast
    on_batch: float


@dataclasses.dataclass(frozen=True)
class UpdateForecasts:
    """What one update would do.

    Attributes:
        forecast: of δH₁, or of its direct part where that alone was asked for.
        split: its parts; None with the score function, or from an engine that measures nothing but the whole.
        functionals: forecasts of the other numbers that were given, by name.
    """

    forecast: Forecast
    split: Split | None
    functionals: Mapping[str, Forecast]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What turns sums into forecasts and shares.

    Attributes:
        learning_rate: lr.
        n_entropy: prompts of the entropy batch.
        n_update: prompts of the update batch.
        parameters: names, in registry order.
        empty: what was left out of each batch, by its role.
        parts: of the entropy change that were asked for.
    """

    learning_rate: float
    n_entropy: int
    n_update: int
    parameters: tuple[str, ...]
    empty: Mapping[Role, EmptyResponseReport]
    parts: tuple[Part, ...]


def forecast_of(sums: KernelSums, scale: Scale) -> Forecast:
    """From sums over the influence kernel of one batch, or of two."""
    errors: tuple[float | None, float | None]
    if sums.diagonal is not None:
        assert sums.column_sums is not None
        same = u_estimate(sums.x_dot_y, sums.diagonal, sums.row_sums, sums.column_sums, sums.unit_sizes, sums.kernel)
        value, errors, shares, pairs = (
            same.value,
            (same.se_given_update, same.se_jackknife),
            same.contributions,
            same.pairs,
        )
    else:
        two = two_batch_estimate(sums.x_dot_y, sums.row_sums, sums.column_sums, scale.n_update)
        value, errors, pairs = two.value, (two.se_conditional, two.se_total), two.pairs
        shares = two.projections / len(sums.row_sums)
    lr = scale.learning_rate
    this, population = (math.nan if error is None else lr * error for error in errors)
    return Forecast(
        lr * value,
        this,
        population,
        len(sums.row_sums),
        lr * shares,
        by_parameter(scale.parameters, sums.by_parameter, lr / pairs),
        _by_sequence(sums, scale, lr / pairs),
        _by_token(sums, scale, lr / pairs),
        sums.kernel,
    )


def forecasts_of(found: UpdateSums, scale: Scale) -> UpdateForecasts:
    """Of everything that one update was measured with."""
    forecast = forecast_of(found.sums, scale)
    functionals = {name: forecast_of(sums, scale) for name, sums in found.apart.items() if name != DIRECT}
    return UpdateForecasts(forecast, _split(found, forecast, scale), functionals)


def _split(found: UpdateSums, forecast: Forecast, scale: Scale) -> Split | None:
    if not scale.parts:
        return None
    pairs = scale.learning_rate / (scale.n_entropy * scale.n_update)
    if scale.parts == (DIRECT,):
        unknown = Forecast.unknown(forecast.n_units)
        return Split(unknown, forecast, unknown, pairs * found.sums.x_dot_y)
    direct = found.apart.get(DIRECT)
    if direct is None:
        return None
    rest = forecast_of(found.sums.less(direct), scale)
    return Split(forecast, forecast_of(direct, scale), rest, pairs * direct.x_dot_y)


def _by_sequence(sums: KernelSums, scale: Scale, factor: float) -> dict[Role, SequenceContributions] | None:
    found = sums.by_sequence
    if found is None:
        return None
    if sums.diagonal is not None:
        return {"both": sequence_contributions(found.entropy, found.update, factor, scale.empty["both"])}
    return {
        "entropy": sequence_contributions(found.entropy, None, factor, scale.empty["entropy"]),
        "update": sequence_contributions(None, found.update, factor, scale.empty["update"]),
    }


def _by_token(sums: KernelSums, scale: Scale, factor: float) -> torch.Tensor | None:
    """With the rows that were left out back in their places."""
    if sums.by_token is None:
        return None
    left_out = scale.empty["both" if sums.diagonal is not None else "entropy"].sequences
    count = len(sums.by_token) + len(left_out)
    kept = torch.ones(count, dtype=torch.bool)
    kept[list(left_out)] = False
    shares = torch.zeros(count, sums.by_token.shape[1], dtype=torch.float64)
    shares[kept] = factor * sums.by_token
    return shares
