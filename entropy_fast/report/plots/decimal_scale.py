"""A power of ten for an axis: small changes are read as 4.2 in 10⁻⁴ nats. What is drawn stays the number itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from matplotlib.axis import Axis

__all__ = ["DecimalScale", "figures"]

PLAIN = (1e-2, 1e4)  # between these the largest number is written as it is
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figures(value: float, *, signed: bool = True) -> str:
    """Three figures, with a true minus sign."""
    return format(value, "+.3g" if signed else ".3g").replace("-", "\N{MINUS SIGN}")


@dataclasses.dataclass(frozen=True)
class DecimalScale:
    """Numbers are written in units of 10 to the ``exponent``, with so many decimals."""

    exponent: int
    decimals: int

    @classmethod
    def of(cls, values: Iterable[float]) -> DecimalScale:
        """For an axis on which these stand, NaN and infinities among them: the largest gets three figures."""
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        order = math.floor(math.log10(largest)) if largest else 0
        exponent = 0 if largest == 0 or PLAIN[0] <= largest < PLAIN[1] else order
        return cls(exponent, max(0, 2 - (order - exponent)))

    def text(self, value: float) -> str:
        """Signed, with as many decimals as its neighbours; in powers of ten where those would read as 0."""
        scaled = self._scaled(value)
        if scaled == 0:
            return "0"
        shown = format(scaled, f"+.{self.decimals}f")
        if float(shown) == 0:
            shown = format(scaled, "+.0e")
        return shown.replace("-", "\N{MINUS SIGN}")

    def unit(self, unit: str) -> str:
        """The unit with the power of ten in front."""
        if self.exponent == 0:
            return unit
        return f"10{str(self.exponent).translate(_SUPERSCRIPTS)} {unit}".strip()

    def write(self, axis: Axis) -> None:
        """Write the axis's ticks so."""
        axis.set_major_formatter(lambda value, _: format(self._scaled(value), "g").replace("-", "\N{MINUS SIGN}"))

    def _scaled(self, value: float) -> float:
        # Rounded, so that a tick at 3e-05 reads 3 and not 3.0000000000000004.
        return float(format(value / 10.0**self.exponent, ".12g"))
