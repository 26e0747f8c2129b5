"""Text from models and datasets made safe to show: no control characters, no markup, a bounded length or width."""

from __future__ import annotations

import unicodedata

from rich.cells import get_character_cell_size

from entropy_fast.errors import escaped

__all__ = ["cell_width", "fitted", "printable", "visible"]

MARKS = 2  # characters without a width of their own that one letter may carry; more are a flood into other lines
LINE_END = "⏎"


def printable(text: str, limit: int = 80) -> str:
    """``text`` on one line, without control or invisible formatting characters, cut to ``limit`` characters.

    Terminal escape sequences lose their escape character, and bidirectional overrides are removed with the other
    format characters. Markup (rich, HTML) is left to whoever renders it to escape.
    """
    clean = _one_line(text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def fitted(text: str, cells: int, cut: str = "…") -> str:
    """`printable` text that takes at most ``cells`` cells of a terminal, however wide its characters are.

    A letter keeps two of its combining marks, and a mark without a letter before it goes. Selectors and joiners of emoji go
    too: terminals do not agree on how wide what they make is.

    Args:
        text: anything.
        cells: 0 or more.
        cut: what stands at the end of a text that was cut; left out where there is no room for it.
    """
    kept: list[str] = []
    width, marks = 0, MARKS
    room = max(cells - len(cut), 0)
    at_cut = 0  # how many characters fit before the mark of a cut
    for character in _one_line(text):
        own = cell_width(character)
        marks = marks + 1 if own == 0 else 0
        if (own == 0 and (marks > MARKS or not kept)) or _is_selector(character):
            continue
        width += own
        if width > cells:
            return "".join(kept[:at_cut]) + cut[:cells]
        kept.append(character)
        if width <= room:
            at_cut = len(kept)
    return "".join(kept)


def cell_width(text: str) -> int:
    """Cells of a terminal that a text takes, character by character."""
    return sum(get_character_cell_size(character) for character in text)


def _one_line(text: str) -> str:
    clean = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(clean.split())


def _is_selector(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f"


def visible(text: str, limit: int) -> str:
    """``text`` in full, for a page on which it keeps its lines: what does not print is written as its Python escape.

    Line ends are marked and kept. No control character, no bidirectional override and no half of a surrogate pair is left.
    What is longer than ``limit`` characters is cut, and its length said. Markup is left to whoever renders it to escape.
    """
    cut = text[:limit]
    lines = [escaped(line) for line in cut.replace("\r\n", "\n").split("\n")]
    shown = f"{LINE_END}\n".join(lines)
    return shown if len(text) <= limit else f"{shown}… ({len(text):,} characters)"
