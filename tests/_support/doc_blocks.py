"""Code blocks of the documentation, as they stand in the Markdown files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>.*)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the file.
        line: of its first line of code, from 1.
        language: as the fence says; empty where it says nothing.
        text: the code, without the indentation of the fence.
    """

    page: Path
    line: int
    language: str
    text: str


def pages() -> list[Path]:
    """Every page that a user reads."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, from top to bottom.

    Raises:
        ValueError: a fence is not closed.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    position = 0
    while position < len(lines):
        opened = FENCE.match(lines[position])
        position += 1
        if opened is None:
            continue
        first, indent = position, len(opened["indent"])
        while position < len(lines) and lines[position].strip() != "```":
            position += 1
        if position == len(lines):
            raise ValueError(f"{page.name}:{first}: the fence is not closed.")
        yield Block(page, first + 1, opened["language"], "\n".join(line[indent:] for line in lines[first:position]))
        position += 1
