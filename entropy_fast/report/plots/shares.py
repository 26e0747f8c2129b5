"""Shares of δH₁ as bars, by prompt and by layer. They have no intervals: the result knows none of single shares."""

from __future__ import annotations

import re

from matplotlib.axes import Axes

from entropy_fast.errors import ConfigError, ResultError
from entropy_fast.estimates.held import EntropyPart, layers_of, part_of, parts_of
from entropy_fast.estimates.result import DeltaH1Result, PromptContribution
from entropy_fast.report.plots.canvas import (
    PART_COLOURS,
    PART_MARKERS,
    axes_or_new,
    name_axis,
    named_rows,
    numbered_rows,
    sign_colours,
    text_colour,
    titled,
    zero_line,
)
from entropy_fast.report.plots.decimal_scale import DecimalScale
from entropy_fast.report.plots.labels import prompt_name
from entropy_fast.report.text import printable

__all__ = ["draw_layers", "draw_prompts", "share_of"]

LABEL = 48  # characters of a prompt
BAR = 0.3  # inches
LAYER_NAME = 24  # characters
_NUMBER = re.compile(r".*\.(\d+)")


def share_of(name: str) -> str:
    """What a share is of, in words."""
    return "share of δH₁" if name == "total" else f"share of the {name} part of δH₁"


def draw_prompts(
    result: DeltaH1Result, part: EntropyPart | None, limit: int, *, updates: bool, ax: Axes | None
) -> Axes:
    """The prompts with the largest shares, and the direct part of each share.

    Raises:
        ConfigError: ``limit`` is no positive number, there is no such part, or ``part`` is of update prompts.
        ResultError: the result does not hold it.
    """
    if limit < 1:
        raise ConfigError(f"prompts: limit is {limit!r}.", fix="use a number of prompts, at least 1.")
    name, forecast = part_of(result, part)
    units = _units(result, part, updates=updates)
    shares = [unit.delta_h1 for unit in units] if updates else forecast.by_unit.tolist()
    order = sorted(range(len(units)), key=lambda n: -abs(shares[n]))[:limit]
    values = [shares[n] for n in order]
    ax = axes_or_new(ax, 8.5, 1.35 + BAR * len(order))
    zero_line(ax)
    ax.barh(range(len(order)), values, height=0.7, color=sign_colours(values))
    parts, scale = parts_of(result), DecimalScale.of(values)
    about = _how_many(len(order), len(units), scale.text(sum(values)), scale.text(sum(shares)))
    if part is None and not updates and len(parts) > 1:
        direct = parts["direct"].by_unit.tolist()
        ax.plot(
            [direct[n] for n in order], range(len(order)), PART_MARKERS["direct"], color=PART_COLOURS["direct"],
            markeredgecolor=ax.get_facecolor(), markeredgewidth=1, markersize=6.5, label="_direct",
        )  # fmt: skip
        about += "\nbars: total; dots: its direct part"
    named_rows(ax, [prompt_name(units[n], LABEL) for n in order], fontsize="small")
    numbered_rows(ax, range(len(order)), [scale.text(value) for value in values], [text_colour()] * len(order))
    name_axis(ax, "x", share_of(name), result.unit, scale)
    titled(ax, "Which prompts' updates change the entropy" if updates else "Which prompts change the entropy", about)
    return ax


def _units(result: DeltaH1Result, part: EntropyPart | None, *, updates: bool) -> list[PromptContribution]:
    units = [unit for unit in result.per_prompt if (unit.role == "update") == updates]
    if updates and part is not None:
        raise ConfigError("prompts: update prompts have no share of a part.", fix="leave part out, or updates.")
    if updates and not units:
        raise ResultError(
            "the result does not hold shares of update prompts.",
            fix="pass entropy_rollouts: with one batch every prompt has one share; with two, and a step that is linear in "
            "the gradient, update prompts have their own.",
        )
    return units


def _how_many(shown: int, count: int, there: str, in_all: str) -> str:
    if shown == count:
        return f"all {count} prompts: {in_all}"
    return f"the {shown} that matter most: {there}; all {count} prompts: {in_all}"


def draw_layers(result: DeltaH1Result, part: EntropyPart | None, ax: Axes | None) -> Axes:
    """Shares by decoder layer in model order; where both parts are known and none is named, each of them.

    Raises:
        ConfigError, ResultError: as for `layers_of`.
    """
    name, _ = part_of(result, part)
    shares = layers_of(result, part)
    ax = axes_or_new(ax, min(12.0, 3.0 + 0.32 * len(shares)), 3.6)
    zero_line(ax, "y")
    places, drawn = range(len(shares)), list(shares.values())
    parts = parts_of(result)
    if part is None and len(parts) > 1:
        for shift, side in ((-0.2, "direct"), (0.2, "visitation")):
            own = parts[side].by_layer
            assert own is not None
            ax.bar([x + shift for x in places], list(own.values()), 0.4, color=PART_COLOURS[side], label=side)
            drawn += own.values()
        ax.plot(
            places,
            drawn[: len(shares)],
            "_",
            color=text_colour(),
            markersize=9,
            markeredgewidth=2,
            label="total",
        )
        ax.legend(loc="best", frameon=False, fontsize="small")
    else:
        ax.bar(places, drawn, 0.8, color=sign_colours(drawn))
    _name_layers(ax, list(shares))
    name_axis(ax, "y", share_of(name), result.unit, DecimalScale.of(drawn))
    titled(ax, "Which layers change the entropy")
    return ax


def _name_layers(ax: Axes, names: list[str]) -> None:
    """Numbers of decoder layers, a few of them where there are many; what is in no layer by its name."""
    numbers = [_NUMBER.fullmatch(name) for name in names]
    every = max(1, sum(found is not None for found in numbers) // 16)
    shown = [(x, found[1]) for x, found in enumerate(numbers) if found is not None and int(found[1]) % every == 0]
    shown += [(x, printable(name.split(".")[-1], LAYER_NAME)) for x, name in enumerate(names) if numbers[x] is None]
    ax.set_xticks([x for x, _ in shown], [text for _, text in shown], parse_math=False, fontsize="small")
    for label in ax.get_xticklabels():
        if not label.get_text().isdigit():
            label.set_rotation(90)
    ax.tick_params(axis="x", length=0)
    name_axis(ax, "x", "decoder layer")
