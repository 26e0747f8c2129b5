"""Text from models is data, wherever it is shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from entropy_fast.report.text import printable


@given(st.text())
def test_one_printable_line_of_bounded_length(text):
    shown = printable(text, 20)
    assert len(shown) <= 20
    assert shown.isprintable()
    assert "\x1b" not in shown


def test_escape_sequences_and_overrides_are_disarmed():
    assert printable("a\x1b[31mred\x1b[0m") == "a[31mred[0m"
    assert printable("abc\u202edef\u200b") == "abcdef"
    assert printable("  two\n\n lines\t") == "two lines"


def test_long_text_is_cut_with_a_mark():
    assert printable("x" * 30, 10) == "x" * 9 + "…"
