"""Texts of prompts and tokens in fonts that have their characters; where none has, a square stands for each."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

__all__ = ["drawable"]

SQUARE = "\N{WHITE SQUARE}"
# For scripts that matplotlib's own font lacks; those that are installed are tried in this order.
OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans", "WenQuanYi Zen Hei", "Microsoft YaHei",
    "PingFang SC", "Hiragino Sans", "Noto Sans Devanagari", "Noto Emoji",
)  # fmt: skip


def drawable(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts, and the font families to draw them with: the user's, then others that are needed and installed.

    matplotlib would warn of every character that no font has, and draw an empty box.
    """
    families = list(matplotlib.rcParams["font.family"])
    known = _characters(families)
    missing = {character for text in texts for character in text} - known
    if not missing:
        return list(texts), families
    installed = set(fontManager.get_font_names())
    for family in OTHER_SCRIPTS:
        if family in installed and missing & (found := _characters([family])):
            families.append(family)
            missing -= found
    table = str.maketrans(dict.fromkeys(missing, SQUARE))
    return [text.translate(table) for text in texts], families


def _characters(families: list[str]) -> set[str]:
    """Of the font that matplotlib takes for these families."""
    return {chr(code) for code in get_font(findfont(FontProperties(family=families))).get_charmap()}
