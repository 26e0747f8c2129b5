"""What to do with a result: what follows from its own numbers, in at most three sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.held import part_of, parts_of
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.split import UpdateForecasts
from entropy_fast.report.html.numbers import signed
from entropy_fast.report.text import printable

__all__ = ["advice"]

MOST = 3  # sentences
NAME = 48  # characters of a name that a user gave
HALF = 0.5  # of a change: what is more carries it
FEW = 4  # prompts carry what a gradient does where it takes no more than one in so many of those that have an update


def advice(result: DeltaH1Result) -> tuple[str, ...]:
    """Plain text. Nothing is said of what is not established, or not known."""
    found = (_step(result), _updates(result), _precision(result), _visitation(result))
    return tuple(sentence for sentence in found if sentence)[:MOST]


def _step(result: DeltaH1Result) -> str:
    """The part of the step that carries the change, and what acts on it."""
    name, whole = part_of(result, None)
    changes = {step: parts_of(result, own)[name] for step, own in result.step_parts.items()}
    shares = {step: own.value / whole.value for step, own in changes.items() if whole.value and own.established}
    step = max(shares, key=lambda step: shares[step], default="")
    if not shares.get(step, 0.0) > HALF:
        return ""
    much = f"{shares[step]:.0%} of {'the total' if name == 'total' else 'the direct part'}".replace("%", "\u00a0%")
    if step == "momentum":
        return (
            f"Momentum, which is older batches, is {much}: a smaller learning rate or momentum coefficient (β₁) acts on it at "
            "once, another loss or an entropy bonus on the rest alone."
        )
    if step == "decay":
        return f"Weight decay is {much}, whatever the batch: less of it acts at once."
    return f"This batch's gradient is {much}, {_whose(result)}." if step == "fresh" else ""


def _whose(result: DeltaH1Result) -> str:
    """Whether few prompts' updates do most of what the fresh gradient does."""
    ranked = sorted(result.per_prompt, key=lambda prompt: -abs(prompt.delta_h1))
    sizes = {rank: abs(prompt.as_update) for rank, prompt in enumerate(ranked, start=1) if prompt.as_update}
    if not sizes or result.estimate != "same_batch" or any(map(math.isnan, sizes.values())):
        return "which other updates would change: compare some (--candidate)"
    carried: list[int] = []
    for rank in sorted(sizes, key=lambda rank: -sizes[rank]):
        carried.append(rank)
        if sum(sizes[own] for own in carried) > HALF * sum(sizes.values()):
            break
    if FEW * len(carried) > len(sizes):
        return "by the updates of many prompts: it is the loss itself, so compare other updates (--candidate)"
    return (
        f"most of it by the updates of few prompts: look at {', '.join(f'#{rank}' for rank in sorted(carried))} first"
    )


def _updates(result: DeltaH1Result) -> str:
    """Which of the other updates changes the entropy least, where that is established."""
    if not result.compared:
        return ""
    for part in ("total", "direct"):
        planned = parts_of(result).get(part)
        if planned is None:
            continue
        beyond = _of(result, result.compared, part)
        less = {
            name: own.value
            for name, own in _of(result, result.updates, part).items()
            if name in beyond and beyond[name].established and abs(own.value) < abs(planned.value)
        }
        if less:
            name = min(less, key=lambda name: abs(less[name]))
            where = "in all" if part == "total" else "at the prefixes visited today"
            return (
                f"Of the updates compared “{printable(name, NAME)}” changes the entropy least {where}: by {signed(less[name])} "
                f"in place of {signed(planned.value)}, and that difference is established."
            )
    return "No update compared changes the entropy less than the planned one by a difference that is established."


def _of(result: DeltaH1Result, updates: Mapping[str, UpdateForecasts], part: str) -> dict[str, Forecast]:
    return {name: parts_of(result, own)[part] for name, own in updates.items()}


def _precision(result: DeltaH1Result) -> str:
    """How many prompts would halve the errors, which go with the square root of their number."""
    forecast = result.forecast
    if math.isnan(forecast.std_error) or not forecast.std_error or result.estimate_options.blocks:
        return ""
    return f"Four times as many prompts, {4 * forecast.n_units} in place of {forecast.n_units}, would halve the errors."


def _visitation(result: DeltaH1Result) -> str:
    """That most of a change is in which prefixes are visited."""
    known = parts_of(result)
    if "visitation" not in known or not known["visitation"].established:
        return ""
    if abs(known["visitation"].value) <= abs(known["direct"].value):
        return ""
    return "Most of it is the visitation part: look at what else changes, the length of responses above all."
