"""A forecast in three sentences: how much, how sure, from where."""

from __future__ import annotations

import math
from collections.abc import Sequence

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.split import Split
from entropy_fast.estimates.verdict import percent_of, shown_percent

__all__ = ["explanation"]

NAMED = 2  # prompts that are named


def explanation(
    forecast: Forecast, split: Split | None, level: float, unit: str, prompts: Sequence[tuple[str, float]]
) -> str:
    """Three sentences.

    Args:
        forecast: of δH₁, or of its direct part where that alone is known.
        split: its parts; None with the score function.
        level: the entropy now, in ``unit``.
        unit: of all of them.
        prompts: what every prompt is called, and its share of ``forecast``.
    """
    return " ".join(
        (_how_much(forecast, split, level, unit), _how_sure(forecast, split), _from_where(forecast, split, prompts))
    )


def _how_much(forecast: Forecast, split: Split | None, level: float, unit: str) -> str:
    shown = forecast if split is None else split.direct
    where = "" if split is None else " at the prefixes that the policy visits today"
    if shown.value == 0:
        return f"To first order this update does not change the entropy{where}; it is {level:.3g} {unit} now."
    verb = "lowers" if shown.value < 0 else "raises"
    share = percent_of(abs(shown.value), level)
    percent = "" if math.isnan(share) else f" ({shown_percent(share)} of the {level:.3g} there are now)"
    return f"To first order this update {verb} the entropy{where} by {abs(shown.value):.3g} {unit}{percent}."


def _how_sure(forecast: Forecast, split: Split | None) -> str:
    shown = forecast if split is None else split.direct
    if shown.established is None:
        return "How sure that is cannot be said: there are too few prompts for a standard error."
    low, high = shown.interval()
    sure = "its sign is established" if shown.established else "its sign is not established"
    said = f"For this very update the 95 % interval is [{low:.3g}, {high:.3g}], so {sure}"
    if split is None or math.isnan(split.total.value):
        return f"{said}."
    low, high = split.total.interval()
    total = f"{split.total.value:.3g}, in [{low:.3g}, {high:.3g}]"
    also = "is established too" if split.total.established else "is not established"
    return f"{said}; with the change in which prefixes are visited it is {total}, whose sign {also}."


def _from_where(forecast: Forecast, split: Split | None, prompts: Sequence[tuple[str, float]]) -> str:
    ranked = sorted(prompts, key=lambda prompt: -abs(prompt[1]))[:NAMED]
    named = " and ".join(f"{name} ({share:+.2g})" for name, share in ranked)
    if split is None or math.isnan(split.total.value):
        return f"Of {len(prompts)} prompts {named} have the largest shares of it."
    return (
        f"Of the total, {split.direct.value:+.3g} are from how distributions change and {split.visitation.value:+.3g} "
        f"(standard error {split.visitation.std_error:.2g}) from where the policy goes; of {len(prompts)} prompts {named} have "
        "the largest shares of the total."
    )
