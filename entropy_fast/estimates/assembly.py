"""From an engine's kernel sums to the result a user sees: scale by the learning rate, attach shares and warnings."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from entropy_fast.checks.coverage import coverage_difference
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.estimates import two_batch_estimate, u_estimate
from entropy_fast.estimates.attribution import SequenceContributions, by_parameter, sequence_contributions
from entropy_fast.estimates.kernel_sums import CrossKernelSums, KernelSums
from entropy_fast.estimates.result import (
    ENTROPY_FUNCTIONAL,
    UNIT,
    DeltaH1Result,
    Diagnostics,
    PromptContribution,
    Role,
    StandardError,
)
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import EmptyResponseReport, Rollouts
from entropy_fast.rollouts.units import prompt_units

__all__ = ["empty_response_message", "same_batch_result", "two_batch_result"]

ADDS_UP = 1e-6  # relative; what shares may miss without a note
OFF_POLICY = 0.05  # nats a token that the policy may have moved since sampling without a note: more than 16 bits round


def same_batch_result(
    components: ProbeComponents, engine: str, batch: Rollouts, empty: EmptyResponseReport, sums: KernelSums
) -> DeltaH1Result:
    """The result of the same-batch estimate from kernel sums over units."""
    lr = components.preconditioner.learning_rate
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
    notes = _notes(components, {"rollouts": batch}, {"rollouts": empty})
    if components.config.conditional_variance == "alpha":
        notes.append("conditional_variance='alpha' is for the two-batch estimate; it was not used.")
    if estimate.unbiased_variance is not None and estimate.unbiased_variance < 0:
        notes.append("the unbiased variance came out negative, as it can for few prompts; the other errors stand.")
    units = prompt_units(batch.n_prompts, components.config.blocks)
    shares = [
        _contribution(components, "X", batch, unit, "both", lr * c, lr * e, lr * u)
        for unit, c, e, u in zip(
            units,
            estimate.contributions.tolist(),
            estimate.as_entropy.tolist(),
            estimate.as_update.tolist(),
            strict=True,
        )
    ]
    variance = None if estimate.unbiased_variance is None else lr * lr * estimate.unbiased_variance
    factor, found = lr / estimate.pairs, sums.by_sequence
    by_sequence: dict[Role, SequenceContributions] | None = None
    if found is not None:
        by_sequence = {"both": sequence_contributions(found.entropy, found.update, factor, empty)}
    return _result(
        components,
        engine,
        notes,
        {"rollouts": batch},
        {"rollouts": empty},
        shares,
        sums,
        value=lr * estimate.value,
        std_error=_scaled(estimate.se_jackknife, lr),
        standard_errors=errors,
        unbiased_variance=variance,
        factor=factor,
        by_sequence=by_sequence,
    )


def two_batch_result(
    components: ProbeComponents,
    engine: str,
    entropy: Rollouts,
    update: Rollouts,
    empty: dict[str, EmptyResponseReport],
    sums: CrossKernelSums,
) -> DeltaH1Result:
    """The result of the two-batch estimate from kernel sums between two batches."""
    lr = components.preconditioner.learning_rate
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
    batches = {"entropy": entropy, "update": update}
    of_updates = [] if estimate.update_projections is None else estimate.update_projections.tolist()
    shares = [
        _contribution(
            components, "X", entropy, [n], "entropy", lr * s / entropy.n_prompts, lr * s / entropy.n_prompts, None
        )
        for n, s in enumerate(estimate.projections.tolist())
    ] + [
        _contribution(
            components, "Y", update, [m], "update", lr * t / update.n_prompts, None, lr * t / update.n_prompts
        )
        for m, t in enumerate(of_updates)
    ]
    notes = _notes(components, batches, empty)
    if components.config.full_kernel:
        notes.append("full_kernel was asked for; the two-batch estimate does not keep K.")
    factor, found = lr / estimate.pairs, sums.by_sequence
    by_sequence: dict[Role, SequenceContributions] | None = None
    if found is not None:
        by_sequence = {
            "entropy": sequence_contributions(found.entropy, None, factor, empty["entropy"]),
            "update": sequence_contributions(None, found.update, factor, empty["update"]),
        }
    return _result(
        components,
        engine,
        notes,
        batches,
        empty,
        shares,
        sums,
        value=lr * estimate.value,
        std_error=_scaled(estimate.se_conditional, lr),
        standard_errors=errors,
        unbiased_variance=None,
        factor=factor,
        by_sequence=by_sequence,
    )


def empty_response_message(report: EmptyResponseReport) -> str:
    """One sentence about what was left out."""
    groups = f", and with them the whole of group(s) {list(report.groups)}" if report.groups else ""
    return f"{len(report.sequences)} sequence(s) without response tokens were left out{groups}: rows {list(report.sequences)}."


def _result(
    components: ProbeComponents,
    engine: str,
    notes: list[str],
    batches: dict[str, Rollouts],
    empty: dict[str, EmptyResponseReport],
    shares: list[PromptContribution],
    sums: KernelSums | CrossKernelSums,
    *,
    value: float,
    std_error: float | None,
    standard_errors: tuple[StandardError, ...],
    unbiased_variance: float | None,
    factor: float,
    by_sequence: dict[Role, SequenceContributions] | None,
) -> DeltaH1Result:
    assert components.excluded is not None
    one_batch = isinstance(sums, KernelSums)
    for role, shares_of in (by_sequence or {}).items():
        gap = abs(float(shares_of.delta_h1.sum()) - value)
        if gap > ADDS_UP * abs(value):
            notes.append(
                f"the shares of sequences ({role}) add up to δH₁ but for {gap:.2g}, which rounding leaves where large shares "
                "cancel."
            )
    return DeltaH1Result(
        delta_h1=value,
        std_error=std_error,
        learning_rate=components.preconditioner.learning_rate,
        estimate="same_batch" if one_batch else "two_batch",
        engine=engine,
        geometry=components.preconditioner.geometry,
        entropy_functional=ENTROPY_FUNCTIONAL[components.config.entropy_estimator, components.config.weighting],
        unit=UNIT[components.config.weighting],
        x_dot_y=sums.x_dot_y,
        diagonal=sums.diagonal if isinstance(sums, KernelSums) else None,
        row_sums=sums.row_sums,
        column_sums=sums.column_sums,
        kernel=sums.kernel if isinstance(sums, KernelSums) else None,
        per_prompt=tuple(shares),
        sequences=dict(components.sequences),
        estimate_options=components.config.estimate,
        run_options=components.config.run,
        diagnostics=Diagnostics(
            standard_errors=standard_errors,
            coverage=dict(components.coverage),
            excluded=components.excluded,
            empty_responses=empty,
            leading_products=dict(components.leading_products),
            length_budget="; ".join(f"{name}: {_budget(batch)}" for name, batch in batches.items()),
            sampling={name: (batch.temperature, batch.top_p) for name, batch in batches.items()},
            unbiased_variance=unbiased_variance,
            warnings=tuple(notes),
            plan=components.plan,
        ),
        derivatives=None if isinstance(sums, KernelSums) else sums.derivatives,
        by_parameter=by_parameter(components.registry.names, sums.by_parameter, factor),
        by_sequence=by_sequence,
    )


def _notes(
    components: ProbeComponents, batches: dict[str, Rollouts], empty: dict[str, EmptyResponseReport]
) -> list[str]:
    notes = [f"{name}: {empty_response_message(report)}" for name, report in empty.items() if report.sequences]
    notes.extend(components.notes)
    for name, batch in batches.items():
        message = _sampling_message(name, batch)
        if message is not None:
            notes.append(message)
            warnings.warn(message, EntropyFastWarning, stacklevel=4)
        notes.extend(_old_logprobs_messages(components, name))
        flat = _prompts_without_spread(batch)
        if flat:
            notes.append(
                f"{name}: {flat} of {batch.n_prompts} prompts have advantage 0 throughout: no update comes from them."
            )
        if components.config.weighting == "dr_grpo" and not batch.max_lengths_given:
            score_function = components.config.entropy_estimator == "score_function"
            known = " (about 20% at 8 responses a prompt, 4% at 32)" if score_function else ""
            notes.append(
                f"{name}: L_max is the longest sampled response of each prompt, which depends on the samples and biases X"
                f"{known}; pass max_lengths, the generation budget."
            )
    for label, what in (("X", "entropy"), ("Y", "update")):
        if components.coverage[label].norm == 0:
            notes.append(f"the {what} gradient is exactly 0 (all of its coefficients are), and so is the forecast.")
    difference = coverage_difference(components.coverage["X"], components.coverage["Y"])
    if difference is not None:
        notes.append(difference)
    half = [str(t) for t in (torch.bfloat16, torch.float16) if t in components.compute_dtypes]
    if half:
        notes.append(
            f"computed in {' and '.join(half)}: δH₁ and its shares carry that rounding, besides the standard error."
        )
    excluded = components.excluded
    if excluded is not None and excluded.share > 0:
        notes.append(f"{excluded.share:.3g} of ‖g‖² has no second moment and is left out of Y.")
    if excluded is not None and excluded.below_eps:
        notes.append(f"{excluded.below_eps} elements have sqrt(v̂) below ε: their step is set by ε, not by Adam.")
    return notes


def _prompts_without_spread(batch: Rollouts) -> int:
    assert batch.advantages is not None
    size = torch.zeros(batch.n_prompts, dtype=torch.float64)
    size.index_add_(0, batch.prompt_index, batch.advantages.to(device="cpu", dtype=torch.float64).abs())
    return int((size == 0).sum())


def _sampling_message(name: str, batch: Rollouts) -> str | None:
    if batch.temperature is None or batch.top_p is None:
        return f"{name}: sampling temperature or top-p unknown; anything but (1, 1) biases the entropy gradient."
    if (batch.temperature, batch.top_p) != (1, 1):
        return (
            f"{name}: sampled at temperature {batch.temperature}, top-p {batch.top_p}; log-probs are scored at (1, 1), so the "
            "entropy gradient is biased (about 20% at temperature 0.7)."
        )
    return None


def _old_logprobs_messages(components: ProbeComponents, name: str) -> list[str]:
    """What has to be known where the rollouts of one batch say which policy sampled them, and it is not this one."""
    found = components.sequences["Y" if name == "update" else "X"].ratios
    if found is None:
        return []
    moved, largest = _mean(found.mean_log_ratio), float(found.largest_log_ratio.max())
    if not moved > OFF_POLICY:
        return []
    distance = (
        f"{name}: log-probs are {moved:.3g} nats a token away from old_logprobs on average, and {largest:.3g} at most"
    )
    messages = []
    if name != "update":
        messages.append(
            f"{distance}; the entropy gradient takes responses as drawn from the current policy, and is biased where they were "
            "not. Is column t of old_logprobs about the token in column t?"
        )
    if name != "entropy" and components.config.importance_ratio == "none":
        messages.append(f"{distance}; importance_ratio='token' would put that into the update.")
    if name != "entropy" and components.config.clip_range is not None:
        messages.append(f"{name}: clipping leaves out {_mean(found.clipped):.1%} of a response's tokens on average.")
    return messages


def _budget(batch: Rollouts) -> str:
    return "L_max given" if batch.max_lengths_given else "L_max is the longest sampled response of each prompt"


def _contribution(
    components: ProbeComponents,
    label: str,
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
        mean_sequence_logprob=_mean(components.sequences[label].sequence_logprobs[rows]),
        mean_reward=None if batch.rewards is None else _mean(batch.rewards.cpu()[rows]),
        mean_abs_advantage=_mean(batch.advantages.cpu()[rows].abs()),
        prompt=None if batch.prompts is None else "\n".join(batch.prompts[n] for n in unit),
    )


def _mean(values: Tensor) -> float:
    return float(values.to(torch.float64).mean())


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
