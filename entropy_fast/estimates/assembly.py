"""From what an engine measured to the result a user sees: scale by the learning rate, attach shares and warnings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_fast.columns import SequenceTable, Side
from entropy_fast.errors import ModelStateError
from entropy_fast.estimates.attribution import Role
from entropy_fast.estimates.comparison import beyond
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.measured import Measured, UpdateSums
from entropy_fast.estimates.notes import OUTSIDE, Note, aside, empty_response_message, notes_of, of_intervals
from entropy_fast.estimates.response_rows import ResponseRows, response_rows
from entropy_fast.estimates.result import (
    UNIT,
    DeltaH1Result,
    Diagnostics,
    PromptContribution,
    StandardError,
    entropy_functional,
)
from entropy_fast.estimates.setting import Setting
from entropy_fast.estimates.split import Scale, forecast_of, forecasts_of, step_parts_of
from entropy_fast.estimates.terms import FRESH
from entropy_fast.estimates.two_batch import two_batch_estimate
from entropy_fast.estimates.u_statistic import u_estimate
from entropy_fast.rollouts import EmptyResponseReport, Rollouts
from entropy_fast.rollouts.units import prompt_units

__all__ = ["Setting", "empty_response_message", "same_batch_result", "two_batch_result"]

ADDS_UP = 1e-6  # relative; what shares may miss without a note
ENTROPY, UPDATE = Side.FUNCTIONAL.value, Side.UPDATE.value


def same_batch_result(
    measured: Measured, setting: Setting, batch: Rollouts, empty: EmptyResponseReport
) -> DeltaH1Result:
    """The result of the same-batch estimate from kernel sums over units."""
    sums, lr = measured.sums, setting.learning_rate * measured.sums.clip
    assert sums.diagonal is not None and sums.column_sums is not None
    scale = Scale(
        setting.learning_rate,
        batch.n_prompts,
        batch.n_prompts,
        setting.parameters,
        {"both": empty},
        setting.estimate.wanted_parts,
        _population_known(measured),
    )
    forecast = forecast_of(sums, scale)
    estimate = u_estimate(sums.x_dot_y, sums.diagonal, sums.row_sums, sums.column_sums, sums.unit_sizes, sums.kernel)
    population = "the change averaged over the population of prompts and responses"
    errors = [
        StandardError("x_row_means", forecast.std_error, "the change made by this batch's own update"),
        StandardError("jackknife", forecast.population_std_error, population),
    ]
    notes: list[Note] = []
    variance = None
    as_entropy, as_update = forecast.by_unit.tolist(), [None] * len(forecast.by_unit)
    if sums.along is None:
        errors += [
            StandardError("plug_in", _scaled(estimate.se_plug_in, lr), population),
            StandardError("unbiased", _scaled(estimate.se_unbiased, lr), population),
        ]
        variance = estimate.unbiased_variance
        as_entropy = (lr * estimate.as_entropy).tolist()
        if variance is not None and variance < 0:
            negative = "the unbiased variance came out negative, as it can for few prompts; the other errors stand."
            notes.append(aside(negative))
    if sums.along is None or FRESH not in sums.along.rows:
        as_update = (lr * estimate.as_update).tolist()
    shares = [
        _contribution(measured.sequences[ENTROPY], batch, unit, "both", share, own, given)
        for unit, share, own, given in zip(
            prompt_units(batch.n_prompts, setting.estimate.blocks),
            forecast.by_unit.tolist(),
            as_entropy,
            as_update,
            strict=True,
        )
    ]
    told = _Told(tuple(errors), shares, _scaled(variance, lr * lr), notes)
    return _result(measured, setting, {"rollouts": batch}, {"rollouts": empty}, scale, told)


def two_batch_result(
    measured: Measured,
    setting: Setting,
    entropy: Rollouts,
    update: Rollouts,
    empty: dict[Role, EmptyResponseReport],
) -> DeltaH1Result:
    """The result of the two-batch estimate from kernel sums between two batches."""
    sums, lr = measured.sums, setting.learning_rate * measured.sums.clip
    scale = Scale(
        setting.learning_rate,
        entropy.n_prompts,
        update.n_prompts,
        setting.parameters,
        empty,
        setting.estimate.wanted_parts,
        _population_known(measured),
    )
    forecast = forecast_of(sums, scale)
    errors = (
        StandardError("conditional_on_update", forecast.std_error, "the change made by this very update"),
        StandardError(
            "v_x_plus_v_y",
            forecast.population_std_error,
            "the population's change; an upper bound, since the cross term is counted twice",
        ),
    )
    shares = []
    for n, share in enumerate(forecast.by_unit.tolist()):
        shares.append(_contribution(measured.sequences[ENTROPY], entropy, [n], "entropy", share, share, None))
    estimate = two_batch_estimate(sums.x_dot_y, sums.row_sums, sums.column_sums, update.n_prompts)
    fresh_alone = sums.along is None or FRESH not in sums.along.rows
    if estimate.update_projections is not None and fresh_alone:
        for m, t in enumerate(estimate.update_projections.tolist()):
            share = lr * t / update.n_prompts
            shares.append(_contribution(measured.sequences[UPDATE], update, [m], "update", share, None, share))
    batches = {ENTROPY: entropy, UPDATE: update}
    return _result(measured, setting, batches, dict(empty.items()), scale, _Told(errors, shares))


@dataclasses.dataclass(frozen=True)
class _Told:
    """What an estimate tells beside its value: fields as of `DeltaH1Result` and `Diagnostics`."""

    standard_errors: tuple[StandardError, ...]
    shares: list[PromptContribution]
    unbiased_variance: float = math.nan
    notes: list[Note] = dataclasses.field(default_factory=list)


def _result(
    measured: Measured,
    setting: Setting,
    batches: dict[str, Rollouts],
    empty: Mapping[str, EmptyResponseReport],
    scale: Scale,
    told: _Told,
) -> DeltaH1Result:
    sums, estimate = measured.sums, setting.estimate
    found = forecasts_of(UpdateSums(measured.sums, measured.apart), scale)
    updates = {name: forecasts_of(own, scale) for name, own in measured.candidates.items()}
    planned = UpdateSums(measured.sums, measured.apart)
    compared = {name: beyond(planned, own, scale, updates[name], found) for name, own in measured.candidates.items()}
    parts = step_parts_of(planned, scale)
    _refuse_unknown(measured, found.forecast.value, told.standard_errors)
    for name, functional in found.functionals.items():
        _refuse_overflow(name, functional)
    for name, own in updates.items():
        for of, forecast in (("entropy", own.forecast), *own.functionals.items()):
            _refuse_overflow(f"{of} under {name}", forecast)
    notes = [*notes_of(measured, setting, batches, empty), *told.notes]
    notes += of_intervals(found.forecast, sums, setting)
    for role, shares_of in (found.forecast.by_sequence or {}).items():
        # Momentum and decay are no sequence's update.
        whole = found.forecast.value
        if role == "update" and parts:
            whole = parts[FRESH].forecast.value
        gap = abs(float(shares_of.delta_h1.sum()) - whole)
        if gap > ADDS_UP * abs(whole):
            apart = f"the shares of sequences ({role}) add up to δH₁ but for {gap:.2g}"
            notes.append(aside(f"{apart}, which rounding leaves where large shares cancel."))
    # The direct part alone says nothing of the whole.
    known = 1.0 if estimate.wanted_parts != ("direct",) else math.nan
    return DeltaH1Result(
        delta_h1=known * found.forecast.value,
        std_error=known * found.forecast.std_error,
        forecast=found.forecast,
        learning_rate=setting.learning_rate,
        estimate="same_batch" if sums.diagonal is not None else "two_batch",
        engine=setting.engine,
        geometry=setting.geometry,
        entropy_functional=entropy_functional(estimate, masked=setting.measure.mask is not None),
        entropy_level=_level(measured.sequences[ENTROPY], next(iter(batches.values())), setting),
        unit=UNIT[estimate.of_entropy],
        x_dot_y=sums.x_dot_y if setting.linear else math.nan,
        diagonal=_known(sums.diagonal, setting),
        row_sums=_unknown(sums.row_sums, setting),
        column_sums=_known(sums.column_sums, setting),
        kernel=_known(sums.kernel, setting),
        per_prompt=tuple(told.shares),
        sequences=measured.sequences,
        estimate_options=estimate,
        run_options=setting.run,
        diagnostics=Diagnostics(
            standard_errors=told.standard_errors,
            coverage=measured.coverage,
            excluded=measured.excluded,
            empty_responses=empty,
            leading_products=measured.leading_products,
            length_budget="; ".join(f"{name}: {_budget(batch)}" for name, batch in batches.items()),
            sampling={name: (batch.temperature, batch.top_p) for name, batch in batches.items()},
            truncation={name: (batch.top_k, batch.min_p) for name, batch in batches.items()},
            unbiased_variance=told.unbiased_variance,
            warnings=tuple(note.text for note in notes),
            asides=tuple(note.text for note in notes if not note.bears),
            plan=measured.plan,
            clip_factor=sums.clip,
            live_gradient=measured.agreement,
        ),
        derivatives=sums.derivatives,
        split=found.split,
        functionals=found.functionals,
        updates=updates,
        compared=compared,
        step_parts=parts,
        response_rows=_response_rows(found.forecast, batches, empty),
    )


def _response_rows(
    forecast: Forecast, batches: Mapping[str, Rollouts], empty: Mapping[str, EmptyResponseReport]
) -> dict[Role, ResponseRows]:
    """Of the batches that shares of sequences or tokens are of, by role."""
    tokens = forecast.by_token is not None
    if not tokens and forecast.by_sequence is None:
        return {}
    if len(batches) == 1:
        return {"both": response_rows(batches["rollouts"], empty["rollouts"], tokens=tokens)}
    found: dict[Role, ResponseRows] = {
        "entropy": response_rows(batches[ENTROPY], empty[ENTROPY], tokens=tokens),
        "update": response_rows(batches[UPDATE], empty[UPDATE], tokens=False),
    }
    return found


def _population_known(measured: Measured) -> bool:
    return measured.sums.along is None or measured.excluded.share < OUTSIDE


def _known(values: Tensor | None, setting: Setting) -> Tensor | None:
    """None where the kernel is of nothing: no part of the step is linear in the gradient."""
    return values if setting.linear else None


def _unknown(values: Tensor, setting: Setting) -> Tensor:
    return values if setting.linear else torch.full_like(values, math.nan)


def _refuse_overflow(name: str, forecast: Forecast) -> None:
    if not math.isfinite(forecast.value) or math.isinf(forecast.std_error):
        raise ModelStateError(
            f"the forecast of {name!r} came out as {forecast.value} ± {forecast.std_error}: products overflow.",
            fix="pass numbers of an ordinary size.",
        )


def _refuse_unknown(measured: Measured, value: float, errors: tuple[StandardError, ...]) -> None:
    """Raise where arithmetic ran out of range: what came out is no number, or a 0 that nobody measured.

    Raises:
        ModelStateError: it did; the message says which way.
    """
    fix = "look for weights, advantages or second moments that are very large or very small; scale them to an ordinary size."
    if not math.isfinite(value):
        raise ModelStateError(f"the forecast came out as {value}: products of gradients overflow.", fix=fix)
    for error in errors:
        # NaN is what is not defined for a batch like this.
        if math.isinf(error.value):
            raise ModelStateError(f"the standard error '{error.name}' overflows.", fix=fix)
    x, y = [measured.coverage[side.value].norm for side in Side]
    if x and y and value == 0 and not bool(measured.sums.row_sums.any()):
        raise ModelStateError(
            f"all products of the entropy gradient (norm {x:.3g}) and the update gradient (norm {y:.3g}) came out as exactly "
            "0: they are too small to be represented.",
            fix=fix,
        )


def _level(table: SequenceTable, batch: Rollouts, setting: Setting) -> float:
    """The entropy now, in the unit of δH₁: of token entropies where they are known, and of -S_i elsewhere."""
    unknown = bool(table.entropy_sums.isnan().any())
    return setting.measure.level(batch, -table.sequence_logprobs if unknown else table.entropy_sums)


def _budget(batch: Rollouts) -> str:
    return "L_max given" if batch.max_lengths_given else "L_max is the longest sampled response of each prompt"


def _contribution(
    table: SequenceTable,
    batch: Rollouts,
    unit: list[int],
    role: Role,
    share: float,
    as_entropy: float | None,
    as_update: float | None,
) -> PromptContribution:
    rows = torch.cat([batch.rows_of_prompt(n) for n in unit])
    assert batch.advantages is not None
    return PromptContribution(
        group_ids=tuple(batch.group_order[n] for n in unit),
        role=role,
        delta_h1=share,
        as_entropy=as_entropy,
        as_update=as_update,
        n_responses=len(rows),
        mean_response_length=_mean(batch.response_lengths[rows]),
        mean_sequence_logprob=_mean(table.sequence_logprobs[rows]),
        mean_reward=None if batch.rewards is None else _mean(batch.rewards.cpu()[rows]),
        mean_abs_advantage=_mean(batch.advantages.cpu()[rows].abs()),
        prompt=None if batch.prompts is None else "\n".join(batch.prompts[n] for n in unit),
    )


def _mean(values: Tensor) -> float:
    return float(values.to(torch.float64).mean())


def _scaled(value: float | None, factor: float) -> float:
    """NaN where it is not defined."""
    return math.nan if value is None else factor * value
