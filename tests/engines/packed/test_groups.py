"""Sequences of a packed row as tables: those with a token, and runs of them."""

from __future__ import annotations

import torch

from entropy_fast.engines.packed.groups import AttentionGroups
from entropy_fast.engines.packed.layout import PackedGroup

CPU = torch.device("cpu")
GROUPS = (
    PackedGroup(0, (0, 3), (0, 5), ((0, 4), (4, 4), (4, 7))),
    PackedGroup(1, (3, 4), (5, 7), ((7, 7),)),
    PackedGroup(2, (4, 5), (7, 8), ((7, 9),)),
    PackedGroup(3, (5, 7), (8, 8), ((9, 10), (10, 12))),
)


def test_tails_with_their_prefixes() -> None:
    groups = AttentionGroups(GROUPS, tails=True, device=CPU)
    assert groups.sequences.tolist() == [
        [0, 4, 0, 5, 0],
        [4, 7, 0, 5, 2],
        [7, 9, 7, 8, 4],
        [9, 10, 8, 8, 5],
        [10, 12, 8, 8, 6],
    ]
    assert groups.by_prefix.tolist() == [0, 2, 3, 4, 5]
    assert groups.each.tolist() == [0, 1, 2, 3, 4, 5]
    assert [part.group.unit for part in groups.parts] == [0, 2, 3]


def test_prefixes_are_sequences_of_their_own() -> None:
    groups = AttentionGroups(GROUPS, tails=False, device=CPU)
    assert groups.sequences.tolist() == [[0, 5, 0, 0, 0], [5, 7, 0, 0, 3], [7, 8, 0, 0, 4]]
    assert groups.by_prefix.tolist() == groups.each.tolist() == [0, 1, 2, 3]


def test_nothing_at_all() -> None:
    groups = AttentionGroups(GROUPS[1:2], tails=True, device=CPU)
    assert groups.sequences.shape == (0, 5)
    assert groups.by_prefix.tolist() == groups.each.tolist() == [0]
    assert groups.parts == []
