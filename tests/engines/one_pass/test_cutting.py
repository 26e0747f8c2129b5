"""How a batch is cut."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from entropy_fast.engines.one_pass.cutting import cut


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 500))
@example([5, 5, 5, 400, 5, 5], 20)
def test_cut(tokens: list[int], limit: int) -> None:
    groups = cut(tokens, limit)
    assert [number for group in groups for number in group] == list(range(len(tokens)))
    for group in groups:
        assert group
        assert len(group) == 1 or sum(tokens[number] for number in group) <= limit


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 100))
@example(7, 1, 3)
@example(13, 1, 3)
def test_equal_units_are_cut_into_as_few_groups_as_hold_them(count: int, tokens: int, limit: int) -> None:
    assert len(cut([tokens] * count, limit)) == -(-count // max(1, limit // tokens))


def test_groups_are_about_equal() -> None:
    """And not full ones with a small one at the end."""
    assert [len(group) for group in cut([1] * 13, 3)] == [3, 3, 2, 3, 2]
    assert [len(group) for group in cut([10] * 6, 50)] == [3, 3]
    assert cut([30, 10, 10, 10, 30, 30], 60) == [[0, 1, 2, 3], [4, 5]]
