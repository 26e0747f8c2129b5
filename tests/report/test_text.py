"""Text from models is data, wherever it is shown."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from entropy_fast.report.text import cell_width, fitted, printable

HOSTILE = {
    "escape sequences": "a\x1b[31mred\x1b[0m\x1b]0;title\x07b\x9b2J",
    "carriage return": "kept\roverwritten\x08\x08\x08",
    "bidirectional overrides": "abc\u202edef\u2066ghi\u2069\u200f",
    "combining flood": "e" + "\u0301" * 500 + "f",
    "leading marks": "\u0301\u20dd\u0489abc",
    "wide": "漢字" * 40 + "😀" * 40,
    "joined emoji": "👨‍👩‍👧‍👦" * 20,
    "selectors": "❤️" * 40,
    "markup": "[bold red]not bold[/bold red] </script>",
    "surrogates and private": "a\ud800b\ue000c\U000e0041d",
    "separators": "a\u2028b\u2029c\x85d\x0be",
    "hangul fillers": "\u3164\u1160\u115f" * 30,
}


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


def inert(shown: str, cells: int) -> None:
    assert shown.isprintable()
    assert cell_len(shown) == cell_width(shown) <= cells
    assert not any(unicodedata.category(c)[0] == "C" for c in shown)
    widths = [cell_width(c) for c in shown]
    assert not widths or widths[0] > 0  # no mark that would sit on what stands before
    assert "000" not in "".join("0" if width == 0 else "1" for width in widths)  # at most two marks a letter


pieces = st.one_of(
    st.text(max_size=8), st.sampled_from(list(HOSTILE.values())), st.text("e\u0301\u0489漢\u202e\x1b \u200d😀")
)


@given(st.lists(pieces, max_size=6).map("".join), st.integers(0, 60), st.sampled_from(["…", "...", ""]))
def test_anything_fits_any_width_and_is_inert(text, cells, cut):
    shown = fitted(text, cells, cut)
    inert(shown, cells)
    whole = fitted(text, 10**6, cut)
    if cell_width(whole) <= cells:
        assert shown == whole  # nothing is cut that need not be
    elif cells >= len(cut):
        assert shown.endswith(cut) and whole.startswith(shown.removesuffix(cut))
        assert cell_width(shown) >= cells - 1 - (cut == "")  # a wide character may leave one cell


@pytest.mark.parametrize("name", HOSTILE)
def test_known_attacks(name):
    inert(fitted(HOSTILE[name], 30), 30)


def test_what_is_kept():
    assert fitted("e\u0301\u0301\u0301\u0301f", 9) == "e\u0301\u0301f"
    assert fitted("\u0301abc", 9) == "abc"
    assert fitted("漢字漢字", 5) == "漢字…"
    assert fitted("漢字漢字", 4) == "漢…"
    assert fitted("漢字", 4) == "漢字"
    assert fitted("abcdef", 3, "...") == "..."
    assert fitted("abcdef", 2, "...") == ".."
    assert fitted("abc", 0) == ""
    assert fitted("[red]x[/red]", 40) == "[red]x[/red]"
