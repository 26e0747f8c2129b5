"""Figures that no registry knows, axes that notebooks show, and what all figures have in common: colours, lines, texts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from entropy_fast.report.plots.decimal_scale import DecimalScale
from entropy_fast.report.plots.fonts import drawable

__all__ = [
    "LOWERS",
    "MUTED",
    "PART_COLOURS",
    "PART_MARKERS",
    "RAISES",
    "ShownAxes",
    "ShownFigure",
    "axes_or_new",
    "diverging",
    "name_axis",
    "named_rows",
    "new_figure",
    "numbered_rows",
    "sign_colours",
    "text_colour",
    "titled",
    "zero_line",
]

# Okabe and Ito's, which stay apart for every kind of colour vision.
RAISES, LOWERS, MUTED = "#0072B2", "#D55E00", "#8C8C8C"
# Darker than theirs, since numbers are written in them; the total has the colour of text.
PART_COLOURS = {"direct": "#007F5F", "visitation": "#AA4499"}
PART_MARKERS = {"direct": "o", "visitation": "s", "total": "D"}
DOTS_PER_INCH = 100
SCALE = 2  # pixels of a notebook's picture for each that it takes on the page


def _png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """A picture for a notebook, and the size at which it shows it."""
    figure.savefig(file := io.BytesIO(), format="png", dpi=figure.dpi)
    width, height = (figure.get_size_inches() * figure.dpi / SCALE).round().astype(int)
    return file.getvalue(), {"width": int(width), "height": int(height)}


class ShownFigure(Figure):
    """A figure that a notebook shows although pyplot does not know it."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return _png(self)


class ShownAxes(Axes):
    """Axes whose figure a notebook shows when they are what a cell gives."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        figure = self.get_figure(root=True)
        assert figure is not None
        return _png(figure)


def new_figure(width: float, height: float) -> ShownFigure:
    """An empty figure of so many inches, with the Agg canvas."""
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08, hspace=0.06)
    figure = ShownFigure(figsize=(width, height), dpi=SCALE * DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """The user's axes, or axes of a new figure of that size."""
    if ax is not None:
        return ax
    return new_figure(width, height).add_subplot(axes_class=ShownAxes)


def text_colour() -> str:
    """What the user's style has for text: black, or white on dark figures."""
    return str(matplotlib.rcParams["text.color"])


def diverging() -> LinearSegmentedColormap:
    """From what lowers the entropy over white to what raises it."""
    map_ = LinearSegmentedColormap.from_list("entropy_fast", [LOWERS, "#F7F7F7", RAISES])
    map_.set_bad("#D9D9D9")
    return map_


def sign_colours(values: Sequence[float]) -> list[str]:
    """A colour for each value, by its sign."""
    return [LOWERS if value < 0 else RAISES for value in values]


def titled(ax: Axes, title: str, about: str = "") -> None:
    """A title at the left, and under it a line or two about what is shown; texts of others in them are no mathematics."""
    lines = about.count("\n") + 1 if about else 0
    ax.set_title(title, loc="left", pad=6 + 13 * lines, fontsize="medium", fontweight="bold", parse_math=False)
    if about:
        said = ax.annotate(
            about, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", va="bottom", fontsize="small",
            color=text_colour(), alpha=0.65, parse_math=False, linespacing=1.3,
        )  # fmt: skip
        said.set_in_layout(
            False
        )  # it may be wider than the axes, whose size it must not change; the title keeps its place
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def zero_line(ax: Axes, axis: str = "x") -> None:
    """A line at 0 across the axis, and faint ones at its other ticks."""
    draw: Any = ax.axvline if axis == "x" else ax.axhline
    draw(0, color=text_colour(), linewidth=0.8, zorder=1)
    ax.grid(axis="x" if axis == "x" else "y", color=MUTED, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def name_axis(ax: Axes, axis: str, what: str, unit: str = "", scale: DecimalScale | None = None) -> None:
    """What stands along an axis, and its unit; with a scale the ticks are written in its power of ten."""
    if scale is not None:
        scale.write(ax.xaxis if axis == "x" else ax.yaxis)
        unit = scale.unit(unit)
    if axis == "x":
        ax.set_xlabel(f"{what} ({unit})" if unit else what, loc="left", parse_math=False)
    else:
        ax.set_ylabel(f"{what}\n({unit})" if unit else what, fontsize="small", parse_math=False)


def named_rows(ax: Axes, names: Sequence[str], *, fontsize: str = "medium") -> None:
    """One row a name, from the top; names are no mathematics."""
    texts, families = drawable(names)
    ax.set_yticks(range(len(names)), texts, parse_math=False, fontsize=fontsize, fontfamily=families)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) - 0.4, -0.6)


def numbered_rows(ax: Axes, places: Sequence[float], numbers: Sequence[str], colours: Sequence[str]) -> None:
    """Numbers at the right of rows."""
    right = ax.secondary_yaxis("right")
    right.set_yticks(places, numbers, parse_math=False, fontsize="small")
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    for label, colour in zip(right.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
