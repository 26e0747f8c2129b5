"""How a result was computed: estimand, step, plan, errors and what each is about, versions, and how to repeat it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.html.numbers import plain
from entropy_fast.report.text import printable
from entropy_fast.run_folder.result_reading import SavedResult

__all__ = ["MethodSection", "method_section"]

TEXT = 4000
GEOMETRY = {
    "next_step": "the whole step that the optimizer takes next, with momentum, weight decay and clipping",
    "adam_static": "Adam's static geometry: learning rate · gradient / (√v̂ + ε), without momentum, decay and clipping",
}
ESTIMATES = {"same_batch": "one batch", "two_batch": "two batches: one for the entropy, one for the update"}
UNKNOWN = "not recorded"


@dataclasses.dataclass(frozen=True)
class MethodSection:
    """Names and texts.

    Attributes:
        facts: what was estimated, and how.
        errors: every standard error: name, value, what it is about.
        options: that are not as by default.
        versions: of Python, this package and libraries.
        files: what was read.
        commands: that give the result again.
        directory: that they are typed in.
        made: when and where.
        notes: that do not bear on what may be concluded.
    """

    facts: tuple[tuple[str, str], ...]
    errors: tuple[tuple[str, str, str], ...]
    options: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]
    directory: str
    made: str
    notes: tuple[str, ...]


def method_section(saved: SavedResult) -> MethodSection:
    """Of any result that was read."""
    result, provenance = saved.result, saved.provenance
    errors = tuple(
        (error.name, plain(error.value, 3) if not math.isnan(error.value) else "not defined here", error.covers)
        for error in result.diagnostics.standard_errors
    )
    changed = [*_changed(result.estimate_options), *_changed(result.run_options)]
    versions = {"entropy-fast": saved.version} if provenance is None else provenance.versions
    return MethodSection(
        tuple((name, printable(text, TEXT)) for name, text in _facts(saved)),
        errors,
        tuple(changed),
        _texts(versions),
        () if provenance is None else _texts(provenance.files),
        () if provenance is None else tuple(printable(command, TEXT) for command in provenance.commands),
        "" if provenance is None else printable(provenance.directory, TEXT),
        UNKNOWN if provenance is None else printable(f"{provenance.finished}, {provenance.machine}", TEXT),
        tuple(printable(note, TEXT) for note in result.diagnostics.asides),
    )


def _facts(saved: SavedResult) -> list[tuple[str, str]]:
    result, provenance = saved.result, saved.provenance
    facts = [
        ("Quantity", f"first-order change of the {result.entropy_functional}"),
        ("Unit", result.unit),
        ("Step", GEOMETRY.get(result.geometry, result.geometry)),
        ("Learning rate", f"{result.learning_rate:g}"),
        ("From", f"{ESTIMATES[result.estimate]}, {_counts(result)}"),
        ("Sampled", _sampling(result)),
        ("Length budget", result.diagnostics.length_budget),
    ]
    if all(table.ratios is None for table in result.sequences.values()):
        facts.append(
            ("Since sampling", "no old_logprobs, so whether the policy has moved since it sampled is not seen")
        )
    if result.diagnostics.clip_factor != 1:
        facts.append(("Gradient clipped to", f"{plain(result.diagnostics.clip_factor)} of its size"))
    if provenance is not None:
        facts.append(("Model", f"{provenance.model} ({provenance.dtype}, {provenance.device})"))
        facts += [("Optimizer", provenance.optimizer)] if provenance.optimizer else []
    facts += [("Engine", result.engine), ("Plan", str(result.plan)), ("Reached", _coverage(result))]
    excluded = result.diagnostics.excluded
    if excluded.share:
        facts.append(("Without second moments", f"{excluded.share:.2%} of the squared gradient, left out of the step"))
    return facts


def _counts(result: DeltaH1Result) -> str:
    units = len([prompt for prompt in result.per_prompt if prompt.role != "update"])
    responses = sum(prompt.n_responses for prompt in result.per_prompt if prompt.role != "update")
    blocks = " blocks of prompts" if result.estimate_options.blocks else " prompts"
    return f"{units}{blocks} with {responses} responses"


def _sampling(result: DeltaH1Result) -> str:
    found = []
    for name, (temperature, top_p) in result.diagnostics.sampling.items():
        top_k, min_p = result.diagnostics.truncation.get(name, (None, None))
        shown = [
            f"{what} {UNKNOWN if value is None else f'{value:g}'}"
            for what, value in (("temperature", temperature), ("top-p", top_p))
        ]
        shown += [f"{what} {value:g}" for what, value in (("top-k", top_k), ("min-p", min_p)) if value]
        found.append(f"{name}: {', '.join(shown)}")
    return "; ".join(found)


def _coverage(result: DeltaH1Result) -> str:
    found = []
    for side, pass_ in result.diagnostics.coverage.items():
        found.append(f"{side}: {pass_.n_with_gradient} of {pass_.n_trainable} trainable parameters")
    return "; ".join(found)


def _changed(options: EstimateOptions | RunOptions) -> list[tuple[str, str]]:
    return [(name, printable(str(getattr(options, name)), 200)) for name in options.changed()]


def _texts(found: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((printable(name, 200), printable(text, TEXT)) for name, text in found.items())
