"""The verdict of a result, and the numbers that it is made from."""

from __future__ import annotations

import dataclasses
import math

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.html.intervals import sure_side_of
from entropy_fast.report.html.numbers import percent, plain, signed
from entropy_fast.report.html.sections.advice import advice
from entropy_fast.report.text import printable
from entropy_fast.run_folder.provenance import Provenance

__all__ = ["Figure", "VerdictSection", "verdict_section"]

LONGEST = 2000  # characters
NAME = 200  # of a model's name
WEIGHTINGS = {"dr_grpo": "Dr. GRPO", "per_token": "GRPO", "pooled": "DAPO"}  # whose length weights they are


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number in large type.

    Attributes:
        label: what it is; value: itself; note: what is to be known of it.
        side: as of `IntervalRow`; empty where it is no change.
    """

    label: str
    value: str
    note: str
    side: str = ""


@dataclasses.dataclass(frozen=True)
class VerdictSection:
    """Sentences are plain text, safe to show.

    Attributes:
        sentence: the verdict.
        explanation: how much, how sure, from where.
        figures: two or three numbers.
        warnings: what bears on it.
        facts: model, optimizer, learning rate and weighting, those that are known.
        advice: what to do with it.
    """

    sentence: str
    explanation: str
    figures: tuple[Figure, ...]
    warnings: tuple[str, ...]
    facts: tuple[str, ...]
    advice: tuple[str, ...]


def verdict_section(result: DeltaH1Result, provenance: Provenance | None = None) -> VerdictSection:
    """Of any result.

    Args:
        result: any.
        provenance: how it came to be; None where it was not said.
    """
    level = result.entropy_level
    figures = [Figure("Entropy now", plain(level), result.unit)]
    if result.split is not None:
        figures.append(_figure("At the prefixes visited today", result.split.direct, level))
    if not math.isnan(result.delta_h1):
        figures.append(_figure("In all", result.forecast, level))
    return VerdictSection(
        _kept_together(result.verdict.sentence),
        _kept_together(printable(result.explain(), LONGEST)),
        tuple(figures),
        tuple(printable(warning, LONGEST) for warning in result.diagnostics.bearing),
        tuple(_facts(result, provenance)),
        advice(result),
    )


def _facts(result: DeltaH1Result, provenance: Provenance | None) -> list[str]:
    facts = []
    if provenance is not None:
        facts.append(printable(f"{provenance.model} ({provenance.dtype}, {provenance.device})", NAME))
        facts += [printable(provenance.optimizer, NAME)] if provenance.optimizer else []
    facts.append(f"learning rate {result.learning_rate:.3g}")
    if result.estimate_options.gradient != "live":
        weighting = result.estimate_options.of_update
        of = f" ({WEIGHTINGS[weighting]})" if weighting in WEIGHTINGS else ""
        facts.append(f"length weights {weighting}{of}")
    return facts


def _figure(label: str, forecast: Forecast, level: float) -> Figure:
    note = {True: "sign established", False: "sign not established", None: "no standard error: too few prompts"}
    value = percent(forecast.value, level) or signed(forecast.value)
    return Figure(label, value, note[forecast.established], sure_side_of(forecast))


def _kept_together(text: str) -> str:
    """Numbers on one line with what belongs to them."""
    return text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")
