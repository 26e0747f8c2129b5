"""Numbers read back from what matplotlib draws."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import same_color


def bars(ax: Axes) -> list[tuple[float, float]]:
    """Place and length of every horizontal bar."""
    return [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in ax.patches]


def columns(ax: Axes) -> list[tuple[float, float]]:
    """Place and height of every vertical bar."""
    return [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches]


def lines(ax: Axes, label: str) -> list[tuple[list[float], list[float]]]:
    """x and y of the lines of that label."""
    found = [line for line in ax.lines if line.get_label() == label]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in found]


def filled(ax: Axes, label: str) -> list[bool]:
    """Whether the markers of that label are filled."""
    found = [line for line in ax.lines if line.get_label() == label]
    return [same_color(line.get_markerfacecolor(), line.get_color()) for line in found]


def rows(ax: Axes) -> list[str]:
    """Names of rows, from the top."""
    return [label.get_text() for label in ax.get_yticklabels()]


def right_numbers(ax: Axes) -> list[str]:
    """What stands at the right of rows."""
    [right] = ax.child_axes
    return [label.get_text() for label in right.get_yticklabels()]


def texts(figure: Any) -> str:
    """All that is written, but for numbers of ticks."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
