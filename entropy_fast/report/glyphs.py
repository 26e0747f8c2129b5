"""The characters that a screen is drawn with, and those that stand in where a stream's encoding lacks them."""

from __future__ import annotations

import dataclasses

from rich.console import Console

__all__ = ["ASCII", "UNICODE", "Glyphs", "glyphs_of"]


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """One set of them; all but ``plus_minus`` and ``cut`` are one cell wide.

    Attributes:
        point: the estimate.
        line: between it and the ends of its interval.
        left: lower end of an interval.
        right: upper end.
        zero: where nothing changes.
        plus_minus: before a standard error.
        cut: at the end of a text that was cut.
    """

    point: str
    line: str
    left: str
    right: str
    zero: str
    plus_minus: str
    cut: str


UNICODE = Glyphs("●", "─", "├", "┤", "┊", "±", "…")
ASCII = Glyphs("o", "-", "|", "|", ":", "+-", "...")


def glyphs_of(console: Console) -> Glyphs:
    """The set that the stream of a console can be written with."""
    try:
        "".join(dataclasses.astuple(UNICODE)).encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE
