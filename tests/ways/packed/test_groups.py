"""Sequences of a packed row as tables: those with a token, and runs of them."""

from __future__ import annotations

import torch

from entropy_fast.ways.packed.groups import AttentionGroups
from entropy_fast.ways.packed.layout import PackedGroup

GROUPS = (
    PackedGroup(0, (0, 3), (0, 5), ((0, 4), (4, 4), (4, 7))),
    PackedGroup(1, (3, 4), (5, 7), ((7, 7),)),
    PackedGroup(2, (4, 5), (7, 8), ((7, 9),)),
    PackedGroup(3, (5, 7), (8, 8), ((9, 10), (10, 12))),
)


def test_tails_with_their_prefixes() -> None:
    groups = AttentionGroups(GROUPS, tails=True)
    assert groups.sequences.table.tolist() == [
        [0, 4, 0, 5, 0],
        [4, 7, 0, 5, 2],
        [7, 9, 7, 8, 4],
        [9, 10, 8, 8, 5],
        [10, 12, 8, 8, 6],
    ]
    assert groups.sequences.by_prefix.tolist() == [0, 2, 3, 4, 5]
    assert groups.sequences.each.tolist() == [0, 1, 2, 3, 4, 5]


def test_prefixes_are_sequences_of_their_own() -> None:
    groups = AttentionGroups(GROUPS, tails=False)
    assert groups.sequences.table.tolist() == [[0, 5, 0, 0, 0], [5, 7, 0, 0, 3], [7, 8, 0, 0, 4]]
    assert groups.sequences.by_prefix.tolist() == groups.sequences.each.tolist() == [0, 1, 2, 3]


def test_prefixes_in_the_row_of_the_tails() -> None:
    """Tails continue from the first copy; a copy's own sequences continue from nothing."""
    groups = AttentionGroups(GROUPS, tails=True, copies=(0, 1))
    tails = AttentionGroups(GROUPS, tails=True)
    assert groups.sequences.table[:5].tolist() == tails.sequences.table.tolist()
    assert groups.sequences.table[5:, :4].tolist() == [
        [12, 17, 0, 0],
        [17, 19, 0, 0],
        [19, 20, 0, 0],
        [20, 25, 0, 0],
        [25, 27, 0, 0],
        [27, 28, 0, 0],
    ]
    assert (groups.copy(0), groups.copy(1)) == (slice(12, 20), slice(20, 28))


def test_what_comes_back_goes_to_the_copy_of_its_label() -> None:
    groups = AttentionGroups(GROUPS, tails=True, copies=(1,))
    gradient, cotangents = torch.ones(20, 2, 3), torch.randn(3, 2, 8, 3)
    scales = torch.full((3, 8), 4.0, dtype=torch.float64)
    groups.add_to_copies(gradient, cotangents, scales)
    assert torch.equal(gradient[:12], torch.ones(12, 2, 3))
    assert torch.allclose(gradient[12:], 1 + 4 * cotangents[1].transpose(0, 1))


def test_three_columns_in_three_copies() -> None:
    groups = AttentionGroups(GROUPS, tails=True, copies=(2, 0, 1))
    gradient, cotangents = torch.zeros(36, 2, 3), torch.randn(3, 2, 8, 3)
    groups.add_to_copies(gradient, cotangents, torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 8))
    expected = torch.cat([4 * cotangents[2], cotangents[0], 2 * cotangents[1]], 1).transpose(0, 1)
    assert torch.equal(gradient[12:], expected) and not gradient[:12].any()


def test_nothing_at_all() -> None:
    groups = AttentionGroups(GROUPS[1:2], tails=True)
    assert groups.sequences.table.shape == (0, 5)
    assert groups.sequences.by_prefix.tolist() == groups.sequences.each.tolist() == [0]
