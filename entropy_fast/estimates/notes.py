"""Everything about a forecast that deserves a sentence."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_fast.checks.coverage import coverage_difference
from entropy_fast.columns import Side
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.intervals import share_by_chance
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured
from entropy_fast.estimates.setting import Setting
from entropy_fast.rollouts import EmptyResponseReport, Rollouts

__all__ = ["Note", "aside", "empty_response_message", "notes_of", "of_intervals"]

ALIKE = 0.99  # cosine of two gradients, and ratio of their sizes, that need no sentence
FEW_UPDATES = 16  # prompts with an update, below which the error for such updates is too small by simulation
OUTSIDE = 0.01  # share of ‖g‖² without a second moment, from which the error for such updates is not known
OFF_POLICY = 0.05  # nats a token that the policy may have moved since sampling without a note: more than 16 bits round
ENTROPY, UPDATE = Side.FUNCTIONAL.value, Side.UPDATE.value


@dataclasses.dataclass(frozen=True)
class Note:
    """One sentence about a forecast.

    Attributes:
        text: the sentence.
        bears: whether it bears on what may be concluded of this very update: a bias, a guess, another quantity than the reader
            may think. What does not is how things were computed, counts, and the error for such updates.
    """

    text: str
    bears: bool = True


def aside(text: str) -> Note:
    """A note that does not bear on what may be concluded."""
    return Note(text, bears=False)


def notes_of(
    measured: Measured, setting: Setting, batches: Mapping[str, Rollouts], empty: Mapping[str, EmptyResponseReport]
) -> list[Note]:
    """Sentences, those about the batches by their names."""
    notes = [
        Note(f"{name}: {empty_response_message(report)}", bears=bool(report.groups))
        for name, report in empty.items()
        if report.sequences
    ]
    # Of the engine: which way it took.
    notes += [*map(aside, measured.notes), *map(Note, setting.notes)]
    for name, batch in batches.items():
        notes += _of_batch(measured, setting, name, batch)
    notes += _of_gradients(measured)
    notes += _of_live_gradient(measured)
    half = [str(t) for t in (torch.bfloat16, torch.float16) if t in setting.compute_dtypes]
    if half:
        rounded = (
            f"computed in {' and '.join(half)}: δH₁ and its shares carry that rounding, besides the standard error."
        )
        notes.append(aside(rounded))
    return notes


def empty_response_message(report: EmptyResponseReport) -> str:
    """One sentence about what was left out."""
    groups = f", and with them the whole of group(s) {list(report.groups)}" if report.groups else ""
    return f"{len(report.sequences)} sequence(s) without response tokens were left out{groups}: rows {list(report.sequences)}."


def _of_batch(measured: Measured, setting: Setting, name: str, batch: Rollouts) -> list[Note]:
    notes = [Note(f"{name}: {note}") for note in batch.notes()]
    message = _sampling_message(name, batch, setting.estimate)
    if message is not None:
        notes.append(Note(message))
        warnings.warn(message, EntropyFastWarning, stacklevel=7)
    notes += map(Note, _old_logprobs_messages(measured, setting, name))
    flat = _prompts_without_spread(batch)
    if flat:
        said = f"{name}: {flat} of {batch.n_prompts} prompts have advantage 0 throughout: no update comes from them."
        notes.append(aside(said))
    if "dr_grpo" in (setting.estimate.of_entropy, setting.estimate.of_update) and not batch.max_lengths_given:
        score_function = setting.estimate.entropy_estimator == "score_function"
        known = " (about 20% at 8 responses a prompt, 4% at 32)" if score_function else ""
        notes.append(
            Note(
                f"{name}: L_max is the longest sampled response of each prompt, which depends on the samples and biases X"
                f"{known}; pass max_lengths, the generation budget."
            )
        )
    return notes


def _of_gradients(measured: Measured) -> list[Note]:
    notes = []
    if measured.coverage[ENTROPY].norm == 0:
        notes.append(Note("the entropy gradient is exactly 0, since all of its coefficients are: so is the forecast."))
    nothing = "this batch's own update is exactly 0, since all of its coefficients (advantages) are"
    whole = measured.sums.along is not None
    if measured.coverage[UPDATE].norm == 0 and measured.agreement is not None:
        notes.append(Note("the described update of these rollouts is exactly 0; the step is what .grad makes of it."))
    elif measured.coverage[UPDATE].norm == 0 and whole:
        notes.append(Note(f"{nothing}: the rest is momentum's."))
    elif measured.coverage[UPDATE].norm == 0:
        alone = "δH₁ is about that part of the step alone"
        unknown = "what the optimizer's momentum and weight decay will do to the entropy is not in it, and not known"
        notes.append(Note(f"{nothing}; {alone}: {unknown}."))
    difference = coverage_difference(measured.coverage[ENTROPY], measured.coverage[UPDATE])
    if difference is not None:
        notes.append(Note(difference))
    excluded = measured.excluded
    if excluded.share > 0:
        where = "yet: its step is in the part 'scale'" if whole else "and is left out of Y"
        notes.append(Note(f"{excluded.share:.3g} of ‖g‖² has no second moment {where}.", excluded.share >= OUTSIDE))
    if excluded.below_eps:
        small = f"{excluded.below_eps} elements have sqrt(v̂) below ε: their step is set by ε, not by Adam."
        notes.append(aside(small))
    return notes


def of_intervals(forecast: Forecast, sums: KernelSums, setting: Setting) -> list[Note]:
    """Where the interval for such updates may not cover what it says, as far as a batch can show it (docs/validation.md)."""
    notes = []
    if not math.isnan(forecast.largest_share) and forecast.largest_share > share_by_chance(forecast.n_units):
        one = f"one prompt carries {forecast.largest_share:.0%} of the variance between prompts"
        said = "the error for such updates, and its interval, may not cover. That for this update is not concerned."
        notes.append(aside(f"{one}: {said}"))
    kernel = setting.linear and not math.isnan(forecast.population_std_error)
    if kernel and sums.diagonal is not None and sums.column_sums is not None:
        updating = int((sums.column_sums != sums.diagonal).sum())
        if updating < min(FEW_UPDATES, forecast.n_units / 2):
            few = (
                f"{updating} of {forecast.n_units} prompts have an update: the error for such updates is from these few, and "
                "its interval is likely too narrow. That for this update is not concerned."
            )
            notes.append(aside(few))
    return notes


def _of_live_gradient(measured: Measured) -> list[Note]:
    found = measured.agreement
    if found is None:
        return []
    notes = []
    if found.prompts == found.of and found.cosine < ALIKE:
        notes.append(
            Note(
                f"the gradient in .grad has cosine {found.cosine:.3g} with what these rollouts' advantages make: its loss is "
                "another one (a KL term, other masks, weights or advantages). The forecast follows .grad."
            )
        )
    scale = found.scale / measured.sums.clip
    if found.prompts == found.of and abs(scale - 1) > 1 - ALIKE and found.cosine >= ALIKE:
        notes.append(aside(f"the gradient in .grad is {scale:.3g} times the rollouts' own: clipped, or scaled."))
    return notes


def _prompts_without_spread(batch: Rollouts) -> int:
    assert batch.advantages is not None
    size = torch.zeros(batch.n_prompts, dtype=torch.float64)
    size.index_add_(0, batch.prompt_index, batch.advantages.to(device="cpu", dtype=torch.float64).abs())
    return int((size == 0).sum())


def _sampling_message(name: str, batch: Rollouts, estimate: EstimateOptions) -> str | None:
    own = (estimate.policy_temperature, 1.0)
    shown = f"({own[0]:g}, 1)"
    unknown = batch.temperature is None or batch.top_p is None
    if not batch.truncated_by and not unknown and batch.temperature == own[0]:
        return None
    known = [
        *([] if batch.temperature is None else [f"temperature {batch.temperature}"]),
        *(["top-p 1.0"] if batch.top_p == 1 else []),
        *batch.truncated_by,
    ]
    if unknown and not batch.truncated_by:
        return f"{name}: sampling temperature or top-p unknown; anything but {shown} biases the entropy gradient."
    sampled = f"{name}: sampled at {', '.join(known)}; log-probs are scored at {shown}"
    if unknown:
        sampled += ", and sampling temperature or top-p is unknown"
    if estimate.wanted_parts == ("direct",):
        return f"{sampled}: the direct part is about the prefixes that were visited so."
    if batch.temperature not in (None, own[0]):
        sampled += (
            ", so the entropy gradient is biased (about 20% at temperature 0.7). If the loss is of log-probs at the sampling "
            "temperature, pass policy_temperature"
        )
    return f"{sampled}."


def _old_logprobs_messages(measured: Measured, setting: Setting, name: str) -> list[str]:
    """What has to be known where the rollouts of one batch say which policy sampled them, and it is not this one."""
    found = measured.sequences[ENTROPY if name == ENTROPY else UPDATE].ratios  # of the update, as a clip range is
    if found is None:
        return []
    moved, largest = _mean(found.mean_log_ratio), float(found.largest_log_ratio.max())
    if not moved > OFF_POLICY:
        return []
    distance = (
        f"{name}: log-probs are {moved:.3g} nats a token away from old_logprobs on average, and {largest:.3g} at most"
    )
    messages = []
    if name != UPDATE:
        messages.append(
            f"{distance}; the entropy gradient takes responses as drawn from the current policy, and is biased where they were "
            "not. Is column t of old_logprobs about the token in column t?"
        )
    if name != ENTROPY and setting.estimate.importance_ratio == "none":
        messages.append(f"{distance}; importance_ratio='token' would put that into the update.")
    if name != ENTROPY and setting.estimate.clip_range is not None:
        messages.append(f"{name}: clipping leaves out {_mean(found.clipped):.1%} of a response's tokens on average.")
    return messages


def _mean(values: Tensor) -> float:
    return float(values.to(torch.float64).mean())
