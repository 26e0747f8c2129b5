"""Intervals drawn one under another on a common scale of characters, so that sizes, errors and signs are seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from entropy_fast.report.glyphs import Glyphs

__all__ = ["Scale"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """A piece of the number line that holds 0, in so many cells.

    A number below 0 is never drawn on the cell of 0 or to the right of it, and one above 0 never to the left: an interval
    covers that cell if and only if it holds 0, however coarse the cells are.

    Attributes:
        low: at the first cell; 0 or below.
        high: at the last cell; 0 or above.
        cells: in all, at least 3.
    """

    low: float
    high: float
    cells: int

    @classmethod
    def of(cls, numbers: Sequence[float], cells: int) -> Scale:
        """That holds 0 and every finite one of ``numbers``."""
        known = [number for number in numbers if math.isfinite(number)]
        return cls(min([0.0, *known]), max([0.0, *known]), cells)

    @property
    def zero(self) -> int:
        """The cell of 0."""
        if self.low == 0 or self.high == 0:
            return 0 if self.high > 0 else self.cells - 1 if self.low < 0 else self.cells // 2
        return min(max(self._nearest(0.0), 1), self.cells - 2)

    def cell(self, number: float) -> int:
        """The cell of a number between ``low`` and ``high``."""
        if number == 0:
            return self.zero
        near = self._nearest(number)
        return min(near, self.zero - 1) if number < 0 else max(near, self.zero + 1)

    def row(self, value: float, interval: tuple[float, float], glyphs: Glyphs) -> str:
        """An estimate with its interval: ``cells`` characters. Of an interval that is not known nothing but the estimate."""
        drawn = [" "] * self.cells
        drawn[self.zero] = glyphs.zero
        if all(map(math.isfinite, interval)):
            first, last = (self.cell(end) for end in interval)
            drawn[first : last + 1] = glyphs.line * (last + 1 - first)
            drawn[first], drawn[last] = glyphs.left, glyphs.right
        if math.isfinite(value):
            drawn[self.cell(value)] = glyphs.point
        return "".join(drawn)

    def header(self) -> str:
        """0 over its cell, and the ends of the scale where there is room for them: ``cells`` characters."""
        drawn = list(" " * self.cells)
        drawn[self.zero] = "0"
        left, right = (f"{end:+.2g}" for end in (self.low, self.high))
        for end, text, start in ((self.low, left, 0), (self.high, right, self.cells - len(right))):
            around = drawn[max(start - 1, 0) : start + len(text) + 1]
            if end and start >= 0 and len(text) <= self.cells and "".join(around).isspace():
                drawn[start : start + len(text)] = text
        return "".join(drawn)

    def _nearest(self, number: float) -> int:
        # Halves first: the ends of the range of doubles have no distance that is one.
        whole = self.high / 2 - self.low / 2
        along = (number / 2 - self.low / 2) / whole if whole > 0 else 0.5
        return min(max(round(along * (self.cells - 1)), 0), self.cells - 1)
