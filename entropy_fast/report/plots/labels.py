"""What a prompt is called in a figure."""

from __future__ import annotations

from entropy_fast.estimates.result import PromptContribution
from entropy_fast.report.text import printable

__all__ = ["prompt_name"]


def prompt_name(unit: PromptContribution, limit: int) -> str:
    """Its text where there is one, its group ids otherwise; one printable line of at most ``limit`` characters."""
    return printable(f"group {', '.join(map(str, unit.group_ids))}" if unit.prompt is None else unit.prompt, limit)
