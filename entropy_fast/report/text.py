"""Text from models and datasets made safe to show: no control characters, no markup, a bounded length."""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]


def printable(text: str, limit: int = 80) -> str:
    """``text`` on one line, without control or invisible formatting characters, cut to ``limit`` characters.

    Terminal escape sequences lose their escape character, and bidirectional overrides are removed with the other
    format characters. Markup (rich, HTML) is left to whoever renders it to escape.
    """
    clean = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
