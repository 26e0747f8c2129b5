"""How units are put into groups of about equal numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["cut"]


def cut(tokens: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive units in groups of about equal numbers of tokens.

    Args:
        tokens: of every unit.
        limit: tokens a group should not exceed; a unit that does stands alone.

    Returns:
        Unit numbers of every group.
    """
    rest = sum(tokens)  # from the group under way on
    share = _share(rest, limit)
    groups: list[list[int]] = [[]]
    held = 0
    for number, own in enumerate(tokens):
        # The boundary nearest to an equal share, as long as the limit holds.
        if groups[-1] and (held + own > limit or held + own / 2 > share):
            # What earlier groups have more or less than their share is spread over those to come.
            rest -= held
            share = _share(rest, limit)
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += own
    return groups if tokens else []


def _share(tokens: int, limit: int) -> float:
    """Tokens of each group when as few as can be are equal."""
    return tokens / max(1, -(-tokens // max(1, limit)))
