"""Several figures of one result on one page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from entropy_fast.estimates.held import entropy_units, parts_of
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.plots.canvas import ShownFigure, new_figure
from entropy_fast.report.plots.intervals import draw_parts, draw_step_parts, draw_updates
from entropy_fast.report.plots.shares import draw_layers, draw_prompts

__all__ = ["contributions", "overview"]

PROMPTS, MORE_PROMPTS = 12, 30
FRAME = 1.4  # inches for a panel's title and axis
ROW = 0.32  # inches
LAYERS = 3.6  # inches


@dataclasses.dataclass(frozen=True)
class _Panel:
    """What draws into the axes that it is given as ``ax``, and how many inches high it wants to be."""

    draw: Callable[..., Axes]
    height: float


def overview(result: DeltaH1Result, figure: FigureBase | None) -> FigureBase:
    """Parts, parts of the step, updates, prompts and layers, those that the result holds."""
    left = [_parts(result)]
    if result.step_parts:
        rows = (len(result.step_parts) + 1) * 1.3
        left.append(_Panel(partial(draw_step_parts, result), FRAME + ROW * rows))
    if result.updates:
        rows = (len(result.updates) + 1) * 1.3
        left.append(_Panel(partial(draw_updates, result, "entropy"), FRAME + ROW * rows))
    right = _prompts(result, PROMPTS)
    if result.by_layer is not None:
        right.append(_Panel(partial(draw_layers, result, None), LAYERS))
    return _page([left, right], figure, 15.0)


def contributions(result: DeltaH1Result) -> ShownFigure:
    """The picture that goes with a result's files: parts of δH₁, and under them the prompts that matter most."""
    figure = _page([[_parts(result), *_prompts(result, MORE_PROMPTS)]], None, 9.5)
    assert isinstance(figure, ShownFigure)
    return figure


def _parts(result: DeltaH1Result) -> _Panel:
    return _Panel(partial(draw_parts, result), FRAME + ROW * len(parts_of(result)))


def _prompts(result: DeltaH1Result, limit: int) -> list[_Panel]:
    """Those whose entropy changes; with two batches those whose update does it too, where their shares are known."""
    own = len(entropy_units(result))
    found = []
    for updates, count in ((False, own), (True, len(result.per_prompt) - own)):
        if count:
            draw = partial(draw_prompts, result, None, limit, updates=updates)
            found.append(_Panel(draw, FRAME + ROW * min(limit, count)))
    return found


def _page(columns: Sequence[Sequence[_Panel]], figure: FigureBase | None, width: float) -> FigureBase:
    if figure is None:
        figure = new_figure(width, max(sum(panel.height for panel in column) for column in columns))
    for column, place in zip(columns, figure.subfigures(1, len(columns), squeeze=False)[0], strict=True):
        heights = [panel.height for panel in column]
        axes = place.subplots(len(column), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for panel, (ax,) in zip(column, axes, strict=True):
            panel.draw(ax=ax)
    return figure
