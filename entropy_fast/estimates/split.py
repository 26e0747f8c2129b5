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
from entropy_fast.estimates.terms import FRESH, errors_of, terms_of
from entropy_fast.rollouts import EmptyResponseReport

__all__ = ["Scale", "Split", "UpdateForecasts", "forecast_of", "forecasts_of", "step_parts_of"]

DIRECT = "direct"
FIXED = ("momentum", "decay")  # parts that no batch has a hand in
PARTS = ("momentum", "decay", "fresh", "scale")  # of the optimizer's step, in the order in which results have them


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
        population_known: whether the error for such updates is known: not where much of the step is of elements without a
            second moment, which other batches would move otherwise.
    """

    learning_rate: float
    n_entropy: int
    n_update: int
    parameters: tuple[str, ...]
    empty: Mapping[Role, EmptyResponseReport]
    parts: tuple[Part, ...]
    population_known: bool = True


def forecast_of(sums: KernelSums, scale: Scale, part: str | None = None) -> Forecast:
    """From sums over the influence kernel of one batch, or of two; along the whole step, or along one part of it."""
    terms = terms_of(sums, scale.learning_rate, scale.n_update)
    used = list(terms.values()) if part is None else [terms[part]]
    one_batch = sums.diagonal is not None
    errors = errors_of(used, one_batch=one_batch)
    factors = _factors(sums, scale)
    whole = part is None
    return Forecast(
        sum(term.value for term in used),
        errors.std_error,
        errors.population_std_error if scale.population_known or part in FIXED else math.nan,
        len(sums.row_sums),
        torch.stack([term.shares for term in used]).sum(0),
        by_parameter(scale.parameters, _by_parameter(sums, part, factors), 1.0),
        _by_sequence(sums, scale, factors) if whole else None,
        _by_token(sums, scale, factors.entropy) if whole else None,
        sums.kernel if whole or part == FRESH else None,
        errors.degrees,
        errors.population_degrees,
        errors.largest_share,
    )


@dataclasses.dataclass(frozen=True)
class _Factors:
    """What turns products into shares: of the kernel, and of shares of sequences and tokens as those that change."""

    kernel: float
    entropy: float


def _factors(sums: KernelSums, scale: Scale) -> _Factors:
    if sums.diagonal is None:
        pairs = float(scale.n_entropy * scale.n_update)
    else:
        sizes = torch.ones(len(sums.row_sums)) if sums.unit_sizes is None else sums.unit_sizes
        pairs = float(sizes.double().sum() ** 2 - sizes.double().square().sum())
    kernel = scale.learning_rate * sums.clip / pairs
    # Along the optimizer's step, rates and signs are in the direction.
    return _Factors(kernel, kernel if sums.along is None else 1.0 / scale.n_entropy)


def _by_parameter(sums: KernelSums, part: str | None, factors: _Factors) -> torch.Tensor | None:
    along = {} if sums.along is None else sums.along.rows
    found = []
    if FRESH not in along and part in (None, FRESH):
        if sums.by_parameter is None:
            return None
        found.append(factors.kernel * sums.by_parameter)
    prompts = len(sums.row_sums) if sums.unit_sizes is None else int(sums.unit_sizes.sum())
    found += [rows.sum(1) / prompts for name, rows in along.items() if part in (None, name)]
    return torch.stack(found).sum(0)


def forecasts_of(found: UpdateSums, scale: Scale, part: str | None = None) -> UpdateForecasts:
    """Of everything that one update was measured with, along the whole step or a part of it."""
    forecast = forecast_of(found.sums, scale, part)
    functionals = {name: forecast_of(sums, scale, part) for name, sums in found.apart.items() if name != DIRECT}
    return UpdateForecasts(forecast, _split(found, forecast, scale, part), functionals)


def step_parts_of(found: UpdateSums, scale: Scale) -> dict[str, UpdateForecasts]:
    """Of every part of the optimizer's whole step; empty under ``adam_static``."""
    if found.sums.along is None:
        return {}
    return {part: forecasts_of(found, scale, part) for part in PARTS if part == FRESH or part in found.sums.along.rows}


def _split(found: UpdateSums, forecast: Forecast, scale: Scale, part: str | None) -> Split | None:
    if not scale.parts:
        return None
    if scale.parts == (DIRECT,):
        unknown = Forecast.unknown(forecast.n_units)
        return Split(unknown, forecast, unknown, _on_batch(found.sums, scale, part))
    direct = found.apart.get(DIRECT)
    if direct is None:
        return None
    rest = forecast_of(found.sums.less(direct), scale, part)
    return Split(forecast, forecast_of(direct, scale, part), rest, _on_batch(direct, scale, part))


def _on_batch(direct: KernelSums, scale: Scale, part: str | None) -> float:
    """X̄ · Δθ with every prompt's own product left in."""
    along = {} if direct.along is None else direct.along.whole
    found = sum(value for name, value in along.items() if part in (None, name)) / scale.n_entropy
    if FRESH in along or part not in (None, FRESH):
        return found
    return found + scale.learning_rate * direct.clip / (scale.n_entropy * scale.n_update) * direct.x_dot_y


def _by_sequence(sums: KernelSums, scale: Scale, factors: _Factors) -> dict[Role, SequenceContributions] | None:
    found = sums.by_sequence
    if found is None:
        return None
    as_entropy, as_update = factors.entropy * found.entropy, factors.kernel * found.update
    if sums.along is not None and FRESH in sums.along.rows:
        as_update = torch.full_like(as_update, math.nan)
    if sums.diagonal is not None:
        alone = sums.along is not None
        return {"both": sequence_contributions(as_entropy, as_update, scale.empty["both"], entropy_alone=alone)}
    return {
        "entropy": sequence_contributions(as_entropy, None, scale.empty["entropy"]),
        "update": sequence_contributions(None, as_update, scale.empty["update"]),
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
