"""The influence kernel as a heat map: whose update changes whose entropy. Prompts alike stand side by side."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.ticker import MaxNLocator

from entropy_fast.errors import ResultError
from entropy_fast.estimates.held import EntropyPart, entropy_units, kernel_shares, part_of
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.plots.canvas import (
    axes_or_new,
    diverging,
    name_axis,
    titled,
)
from entropy_fast.report.plots.decimal_scale import DecimalScale, figures
from entropy_fast.report.plots.fonts import drawable
from entropy_fast.report.plots.labels import prompt_name
from entropy_fast.report.prompt_order import clustered_order

__all__ = ["draw_kernel"]

NAMED = 40  # prompts whose texts are shown
LABEL = 36  # characters of a prompt
WITHIN = 0.99  # of the shares that the colours tell apart


def draw_kernel(result: DeltaH1Result, part: EntropyPart | None, ax: Axes | None, *, clustered: bool) -> Axes:
    """Every pair's share of δH₁; the diagonal, which δH₁ leaves out, is grey.

    Raises:
        ConfigError, ResultError: as for `kernel_shares`; a number of it is not finite.
    """
    name, _ = part_of(result, part)
    shares = kernel_shares(result, part).numpy()
    off = shares[~np.eye(len(shares), dtype=bool)]
    if not np.isfinite(off).all():
        raise ResultError(
            "the influence kernel holds numbers that are not finite.", fix="look for overflow in the model."
        )
    order = clustered_order(shares) if clustered else list(range(len(shares)))
    units = entropy_units(result)
    side = min(8.0, 2.5 + 0.22 * len(units))
    ax = axes_or_new(ax, side + 3.6, side + 1.2)
    largest = float(np.abs(off).max(initial=0.0))
    shown = float(np.quantile(np.abs(off), WITHIN)) if largest else 1.0
    cut = largest > 2 * shown
    image = ax.imshow(
        np.ma.masked_invalid(shares[np.ix_(order, order)]),
        cmap=diverging(),
        norm=CenteredNorm(halfrange=shown if cut else largest or 1.0),
        interpolation="nearest",
    )
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, extend="both" if cut else "neither", shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    scale = DecimalScale.of([shown if cut else largest])
    scale.write(bar.ax.yaxis)
    bar.set_label(f"{_share(result, name)}\n({scale.unit(result.unit)})")
    _name(ax, [prompt_name(units[n], LABEL) for n in order] if len(order) <= NAMED else None, order)
    name_axis(ax, "y", "prompt whose entropy changes")
    name_axis(ax, "x", "prompt whose update changes it")
    titled(
        ax, "Whose update changes whose entropy", f"{figures(float(off.sum()))} in all; the diagonal is no part of it"
    )
    ax.spines["bottom"].set_visible(False)
    return ax


def _share(result: DeltaH1Result, name: str) -> str:
    what = "δH₁" if name == "total" else f"the {name} part of δH₁"
    return f"share of {what} by this batch's gradient" if result.step_parts else f"share of {what}"


def _name(ax: Axes, labels: list[str] | None, order: list[int]) -> None:
    places = range(len(order))
    ax.tick_params(length=0)
    if labels is None:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
            axis.set_major_formatter(lambda x, _: str(order[int(x)]) if 0 <= x < len(order) else "")
        return
    texts, families = drawable(labels)
    numbered = [f"{text}  {n}" for text, n in zip(texts, order, strict=True)]
    ax.set_yticks(places, numbered, parse_math=False, fontsize="small", fontfamily=families)
    ax.set_xticks(places, [str(n) for n in order], fontsize="small")
