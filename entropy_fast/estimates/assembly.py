"""From what an engine measured to the result a user sees: scale by the learning rate, attach shares and warnings."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from entropy_fast.columns import SequenceTable, Side
from entropy_fast.columns.lengths import length_weights
from entropy_fast.config import Weighting
from entropy_fast.errors import ModelStateError
from entropy_fast.estimates.attribution import SequenceContributions, by_parameter, sequence_contributions
from entropy_fast.estimates.measured import Measured
from entropy_fast.estimates.notes import empty_response_message, notes_of
from entropy_fast.estimates.result import (
    ENTROPY_FUNCTIONAL,
    UNIT,
    DeltaH1Result,
    Diagnostics,
    PromptContribution,
    Role,
    StandardError,
)
from entropy_fast.estimates.setting import Setting
from entropy_fast.estimates.split import other_forecasts, split_of
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
    sums, lr = measured.sums, setting.learning_rate
    assert sums.diagonal is not None and sums.column_sums is not None
    estimate = u_estimate(sums.x_dot_y, sums.diagonal, sums.row_sums, sums.column_sums, sums.unit_sizes, sums.kernel)
    population = "the change averaged over the population of prompts and responses"
    errors = (
        StandardError("jackknife", _scaled(estimate.se_jackknife, lr), population),
        StandardError("plug_in", _scaled(estimate.se_plug_in, lr), population),
        StandardError("unbiased", _scaled(estimate.se_unbiased, lr), population),
        StandardError(
            "x_row_means", _scaled(estimate.se_given_update, lr), "the change made by this batch's own update"
        ),
    )
    notes = []
    if estimate.unbiased_variance is not None and estimate.unbiased_variance < 0:
        notes.append("the unbiased variance came out negative, as it can for few prompts; the other errors stand.")
    parts = (estimate.contributions, estimate.as_entropy, estimate.as_update)
    shares = [
        _contribution(measured.sequences[ENTROPY], batch, unit, "both", lr * share, lr * own, lr * given)
        for unit, share, own, given in zip(
            prompt_units(batch.n_prompts, setting.estimate.blocks), *(part.tolist() for part in parts), strict=True
        )
    ]
    variance = _scaled(estimate.unbiased_variance, lr * lr)
    factor, found = lr / estimate.pairs, sums.by_sequence
    by_sequence: dict[Role, SequenceContributions] | None = None
    if found is not None:
        by_sequence = {"both": sequence_contributions(found.entropy, found.update, factor, empty)}
    scaled = _Scaled(
        lr * estimate.value, _scaled(estimate.se_jackknife, lr), errors, shares, factor, by_sequence, variance, notes
    )
    return _result(measured, setting, {"rollouts": batch}, {"rollouts": empty}, scaled)


def two_batch_result(
    measured: Measured,
    setting: Setting,
    entropy: Rollouts,
    update: Rollouts,
    empty: dict[str, EmptyResponseReport],
) -> DeltaH1Result:
    """The result of the two-batch estimate from kernel sums between two batches."""
    sums, lr = measured.sums, setting.learning_rate
    estimate = two_batch_estimate(sums.x_dot_y, sums.row_sums, sums.column_sums, update.n_prompts)
    errors = (
        StandardError(
            "conditional_on_update", _scaled(estimate.se_conditional, lr), "the change made by this very update"
        ),
        StandardError(
            "v_x_plus_v_y",
            _scaled(estimate.se_total, lr),
            "the population's change; an upper bound, since the cross term is counted twice",
        ),
    )
    of_updates = [] if estimate.update_projections is None else estimate.update_projections.tolist()
    shares = []
    for n, s in enumerate(estimate.projections.tolist()):
        share = lr * s / entropy.n_prompts
        shares.append(_contribution(measured.sequences[ENTROPY], entropy, [n], "entropy", share, share, None))
    for m, t in enumerate(of_updates):
        share = lr * t / update.n_prompts
        shares.append(_contribution(measured.sequences[UPDATE], update, [m], "update", share, None, share))
    factor, found = lr / estimate.pairs, sums.by_sequence
    by_sequence: dict[Role, SequenceContributions] | None = None
    if found is not None:
        by_sequence = {
            "entropy": sequence_contributions(found.entropy, None, factor, empty[ENTROPY]),
            "update": sequence_contributions(None, found.update, factor, empty[UPDATE]),
        }
    scaled = _Scaled(lr * estimate.value, _scaled(estimate.se_conditional, lr), errors, shares, factor, by_sequence)
    return _result(measured, setting, {ENTROPY: entropy, UPDATE: update}, empty, scaled)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """An estimate times the learning rate, and what comes with it: fields as of `DeltaH1Result` and `Diagnostics`."""

    value: float
    std_error: float
    standard_errors: tuple[StandardError, ...]
    shares: list[PromptContribution]
    factor: float  # of sums over the kernel
    by_sequence: dict[Role, SequenceContributions] | None
    unbiased_variance: float = math.nan
    notes: list[str] = dataclasses.field(default_factory=list)


def _result(
    measured: Measured,
    setting: Setting,
    batches: dict[str, Rollouts],
    empty: dict[str, EmptyResponseReport],
    scaled: _Scaled,
) -> DeltaH1Result:
    sums, weighting = measured.sums, setting.estimate.weighting
    of_entropy, *more = batches.values()
    of_update = more[0] if more else of_entropy
    _refuse_unknown(measured, scaled.value, scaled.standard_errors)
    functionals = other_forecasts(measured, setting.learning_rate, of_update.n_prompts)
    for name, forecast in functionals.items():
        if not math.isfinite(forecast.value) or math.isinf(forecast.std_error):
            raise ModelStateError(
                f"the forecast of {name!r} came out as {forecast.value} ± {forecast.std_error}: products overflow.",
                fix="pass numbers of an ordinary size.",
            )
    notes = [*notes_of(measured, setting, batches, empty), *scaled.notes]
    for role, shares_of in (scaled.by_sequence or {}).items():
        gap = abs(float(shares_of.delta_h1.sum()) - scaled.value)
        if gap > ADDS_UP * abs(scaled.value):
            notes.append(
                f"the shares of sequences ({role}) add up to δH₁ but for {gap:.2g}, which rounding leaves where large shares "
                "cancel."
            )
    return DeltaH1Result(
        delta_h1=scaled.value,
        std_error=scaled.std_error,
        learning_rate=setting.learning_rate,
        estimate="same_batch" if sums.diagonal is not None else "two_batch",
        engine=setting.engine,
        geometry=setting.geometry,
        entropy_functional=ENTROPY_FUNCTIONAL[setting.estimate.entropy_estimator, weighting],
        entropy_level=_level(measured.sequences[ENTROPY], of_entropy, weighting),
        unit=UNIT[weighting],
        x_dot_y=sums.x_dot_y,
        diagonal=sums.diagonal,
        row_sums=sums.row_sums,
        column_sums=sums.column_sums,
        kernel=sums.kernel,
        per_prompt=tuple(scaled.shares),
        sequences=measured.sequences,
        estimate_options=setting.estimate,
        run_options=setting.run,
        diagnostics=Diagnostics(
            standard_errors=scaled.standard_errors,
            coverage=measured.coverage,
            excluded=measured.excluded,
            empty_responses=empty,
            leading_products=measured.leading_products,
            length_budget="; ".join(f"{name}: {_budget(batch)}" for name, batch in batches.items()),
            sampling={name: (batch.temperature, batch.top_p) for name, batch in batches.items()},
            unbiased_variance=scaled.unbiased_variance,
            warnings=tuple(notes),
            plan=measured.plan,
        ),
        derivatives=sums.derivatives,
        by_parameter=by_parameter(setting.parameters, sums.by_parameter, scaled.factor),
        by_sequence=scaled.by_sequence,
        split=split_of(measured, setting.learning_rate, of_entropy.n_prompts, of_update.n_prompts),
        functionals=functionals,
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


def _level(table: SequenceTable, batch: Rollouts, weighting: Weighting) -> float:
    """The entropy now, in the unit of δH₁: of token entropies where they are known, and of -S_i elsewhere."""
    sums = -table.sequence_logprobs if bool(table.entropy_sums.isnan().any()) else table.entropy_sums
    weighted = length_weights(batch, weighting) * sums
    return float(torch.stack([weighted[batch.rows_of_prompt(n)].mean() for n in range(batch.n_prompts)]).mean())


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
