"""Lines of text for a terminal of a given width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from entropy_fast.errors import escaped
from entropy_fast.report.text import cell_width, fitted, printable

__all__ = ["files_line", "grid", "grid_that_fits", "wrapped"]

BETWEEN = "  "  # columns
LONGEST = 4000  # characters of a sentence at most


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, the first column flush left and the others flush right, all rows with as many cells."""
    widths = [max(map(cell_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - cell_width(first))]
        cells += [" " * (width - cell_width(c)) + c for c, width in zip(others, widths[1:], strict=True)]
        lines.append(BETWEEN.join(cells).rstrip())
    return lines


def grid_that_fits(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The grid of ``rows``, or that of its columns where the first is wider than ``width`` and the second is not."""
    lines = grid(rows)
    if max(map(cell_width, lines)) <= width:
        return lines
    turned = grid(list(zip(*rows, strict=True)))
    return turned if max(map(cell_width, turned)) <= width else lines


def wrapped(text: str, console: Console, *, lines: int, cut: str, width: int | None = None) -> Text:
    """A sentence that may hold anything, broken at words into at most so many lines.

    Args:
        text: made `printable` here.
        console: says how wide a line is, unless ``width`` does.
        lines: at least 1; the last ends in ``cut`` where there would be more.
        cut: the mark of that.
        width: cells of a line.
    """
    width = console.width if width is None else width
    found = list(Text(printable(text, LONGEST)).wrap(console, width))
    if len(found) <= lines:
        return Text("\n".join(line.plain.rstrip() for line in found))
    kept = [line.plain.rstrip() for line in found[:lines]]
    kept[-1] = fitted(kept[-1], width - cell_width(cut), "") + cut
    return Text("\n".join(kept))


def files_line(paths: Sequence[Path], width: int) -> Text:
    """Where files of one folder are: in one line if they fit, and otherwise with the folder, unbroken, on a line of its own.

    Args:
        paths: at least one.
        width: cells of a line.
    """
    names, folder = ", ".join(escaped(path.name) for path in paths), escaped(str(paths[0].parent))
    line = f"written to {folder}: {names}"
    return Text(line if cell_width(line) <= width else f"written: {names}\nto {folder}")
