"""What may be concluded from a forecast, in one sentence, with the numbers that the sentence is made of."""

from __future__ import annotations

import dataclasses
import math

from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.split import Split

__all__ = ["Verdict", "percent_of", "shown_percent", "verdict_of"]

TODAY = "at the prefixes visited today"
IN_ALL = "in all"
TOO_FEW = "there are too few prompts to say how surely"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What this very update does to the entropy, to first order in the learning rate.

    Attributes:
        sentence: the verdict, one sentence of plain text. It holds no text of a model.
        level: the entropy now, in the unit of the result.
        direct_percent: the direct part in percent of ``level``; NaN where there is no such part (the score function), or no
            ``level`` to take it of.
        total_percent: the whole change, likewise; NaN where the direct part alone was asked for.
        direct_established: whether the sign of the direct part is established, as `Forecast.established` has it; None where
            there is no such part, or no standard error.
        total_established: of the whole change, likewise.
    """

    sentence: str
    level: float
    direct_percent: float
    total_percent: float
    direct_established: bool | None
    total_established: bool | None


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of the two changes that a sentence is about.

    Attributes:
        where: which it is, in words that follow "the entropy"; empty where there is nothing to tell it from.
        value: in ``unit``.
        percent: of the level, NaN where there is none.
        established: as of `Forecast`.
        unit: of the value.
    """

    where: str
    value: float
    percent: float
    established: bool | None
    unit: str

    def does(self, what: str) -> str:
        """What the update does to ``what``, in the third person."""
        if self.value == 0:
            return f"does not change {what}"
        return f"{'lowers' if self.value < 0 else 'raises'} {what} by {self.amount}"

    @property
    def amount(self) -> str:
        """Its size without the sign: in percent, and in its unit where there is no percent."""
        if math.isnan(self.percent):
            return f"{abs(self.value):.2g} {self.unit}"
        return shown_percent(abs(self.percent))

    @property
    def signed(self) -> str:
        """The amount with its sign."""
        return f"{'-' if self.value < 0 else '+'}{self.amount}"


def percent_of(value: float, level: float) -> float:
    """A change in percent of the entropy now; NaN where the one is not known or the other no positive number to take it of.

    Args:
        value: the change.
        level: the entropy now, in the same unit.
    """
    percent = 100 * value / level if math.isfinite(level) and level > 0 else math.nan
    return percent if math.isfinite(percent) else math.nan


def shown_percent(percent: float) -> str:
    """Two significant digits, or all before the point up to a million; the sign of what is below 0."""
    return f"{percent:.0f} %" if 9.95 <= abs(percent) < 1e6 else f"{percent:.2g} %"


def verdict_of(forecast: Forecast, split: Split | None, level: float, unit: str) -> Verdict:
    """The verdict of one result.

    Args:
        forecast: of δH₁, or of its direct part where that alone is known, in ``unit``.
        split: its parts; None with the score function.
        level: the entropy now, in ``unit``.
        unit: of all of them.
    """
    direct = None if split is None else split.direct
    total: Forecast | None = forecast
    if split is not None and math.isnan(split.total.value):
        total = None
    found = [
        _Part(where, of.value, percent_of(of.value, level), of.established, unit)
        for where, of in ((TODAY, direct), ("" if direct is None else IN_ALL, total))
        if of is not None
    ]
    return Verdict(
        sentence=_one(found[0]) if len(found) == 1 else _two(*found),
        level=level,
        direct_percent=math.nan if direct is None else percent_of(direct.value, level),
        total_percent=math.nan if total is None else percent_of(total.value, level),
        direct_established=None if direct is None else direct.established,
        total_established=None if total is None else total.established,
    )


def _one(part: _Part) -> str:
    where = f" {part.where}" if part.where else ""
    if part.value == 0:
        return f"To first order this update does not change the entropy{where}: the forecast is exactly 0."
    if part.established is False:
        return f"Which way this update moves the entropy{where} is not established: {part.signed} to first order."
    sure = "its sign is established" if part.established else TOO_FEW
    return f"To first order this update {part.does('the entropy')}{where}; {sure}."


def _two(direct: _Part, total: _Part) -> str:
    if direct.value == total.value == 0:
        return "To first order this update does not change the entropy: the forecast is exactly 0."
    both = f"{direct.does('the entropy')} {direct.where} and {total.does('it')} {total.where}"
    if direct.value * total.value > 0:
        both = f"{direct.does('the entropy')} {direct.where} and by {total.amount} {total.where}"
    if direct.established is None or total.established is None:
        return f"To first order this update {both}; {TOO_FEW}."
    if direct.established and total.established:
        return f"To first order this update {both}; both signs are established."
    if not direct.established and not total.established:
        return (
            f"Which way this update moves the entropy is not established, neither {direct.where} ({direct.signed} to first "
            f"order) nor {total.where} ({total.signed})."
        )
    known, other = (direct, total) if direct.established else (total, direct)
    return (
        f"To first order this update {known.does('the entropy')} {known.where}, and that sign is established; which way it "
        f"goes {other.where} ({other.signed}) is not."
    )
