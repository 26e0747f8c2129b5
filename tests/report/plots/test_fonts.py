"""Characters that no font has are squares, without a warning for each."""

from __future__ import annotations

import matplotlib
import pytest

from entropy_fast.report.plots import fonts
from entropy_fast.report.plots.fonts import drawable


def test_what_the_user_s_font_has_stays_as_it_is():
    assert drawable(["δH₁ ± − ␣ Ω", "x"]) == (["δH₁ ± − ␣ Ω", "x"], list(matplotlib.rcParams["font.family"]))


def test_other_fonts_are_taken_where_they_are_installed(monkeypatch):
    monkeypatch.setattr(fonts.fontManager, "get_font_names", list)
    assert drawable(["计a算"])[0] == ["□a□"]
    own = list(matplotlib.rcParams["font.family"])
    monkeypatch.setattr(fonts.fontManager, "get_font_names", lambda: ["Noto Sans CJK SC", "Noto Emoji"])
    known = {tuple(own): {"a"}, ("Noto Sans CJK SC",): {"计"}, ("Noto Emoji",): {"x"}}
    monkeypatch.setattr(fonts, "_characters", lambda families: known[tuple(families)])
    texts, families = drawable(["计a算"])
    assert texts == ["计a□"] and families == [*own, "Noto Sans CJK SC"]


@pytest.mark.parametrize("text", ["", "\U0001f600 x", "\u0e01"])
def test_any_text_comes_back_with_its_length(text):
    assert len(drawable([text])[0][0]) == len(text)
