"""Shares of one response's tokens, as bars in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from matplotlib.axes import Axes

from entropy_fast.errors import ConfigError, escaped
from entropy_fast.estimates.held import EntropyPart, by_token_of, entropy_units, part_of
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.plots.canvas import (
    axes_or_new,
    name_axis,
    sign_colours,
    titled,
    zero_line,
)
from entropy_fast.report.plots.decimal_scale import DecimalScale, figures
from entropy_fast.report.plots.fonts import drawable
from entropy_fast.report.plots.labels import prompt_name
from entropy_fast.report.plots.shares import share_of

__all__ = ["TokenTexts", "draw_tokens"]

ALL_NAMED = 64  # tokens of which each is named; of longer responses those with the largest shares
NAMED = 12
TEXT = 16  # characters of a token


class TokenTexts(Protocol):
    """What a tokenizer can do."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens."""
        ...


def draw_tokens(
    result: DeltaH1Result,
    prompt: int,
    response: int,
    part: EntropyPart | None,
    tokenizer: TokenTexts | None,
    ax: Axes | None,
) -> Axes:
    """Bars by position; named by their texts, or by their ids without a tokenizer.

    Raises:
        ConfigError: there is no such prompt or response.
        ResultError: the result does not hold shares of tokens.
    """
    name, _ = part_of(result, part)
    by_token = by_token_of(result, part)
    row, columns, ids = _response(result, prompt, response)
    shares = by_token[row, columns].tolist()
    names, families = drawable([_token(token, tokenizer) for token in ids])
    ax = axes_or_new(ax, min(14.0, 2.5 + 0.22 * len(ids)), 3.6)
    zero_line(ax, "y")
    ax.bar(range(len(ids)), shares, 0.8 if len(ids) <= ALL_NAMED else 1.0, color=sign_colours(shares))
    if len(ids) <= ALL_NAMED:
        ax.set_xticks(range(len(ids)), names, rotation=90, parse_math=False, fontsize="small", fontfamily=families)
        ax.tick_params(axis="x", length=0)
    else:
        for x in sorted(range(len(ids)), key=lambda t: -abs(shares[t]))[:NAMED]:
            ax.annotate(
                names[x], (x, shares[x]), (0, 3 if shares[x] >= 0 else -3), textcoords="offset points", rotation=90,
                ha="center", va="bottom" if shares[x] >= 0 else "top", fontsize="x-small", parse_math=False,
                fontfamily=families,
            )  # fmt: skip
        ax.margins(y=0.2)
    ax.set_xlim(-0.7, len(ids) - 0.3)
    name_axis(ax, "x", "tokens of the response, in order")
    name_axis(ax, "y", share_of(name), result.unit, DecimalScale.of(shares))
    about = f"response {response} to {_prompt(result, prompt)}; {figures(sum(shares))} in all"
    titled(ax, "Which tokens change the entropy", about)
    return ax


def _prompt(result: DeltaH1Result, prompt: int) -> str:
    units = entropy_units(result)
    if all(len(unit.group_ids) == 1 for unit in units):
        return f"prompt {prompt}: {prompt_name(units[prompt], 60)}"
    return f"prompt {prompt}"


def _response(result: DeltaH1Result, prompt: int, response: int) -> tuple[int, list[int], list[int]]:
    """Its row in the rollouts, the columns of its tokens, and their ids."""
    rows = next(rows for role, rows in result.response_rows.items() if role != "update")
    own = (rows.prompt == prompt).nonzero().squeeze(-1).tolist()
    if not own:
        raise ConfigError(
            f"tokens: there is no prompt {prompt!r}.",
            fix=f"use a number from 0 to {int(rows.prompt.max())}, in batch order.",
        )
    if not 0 <= response < len(own):
        raise ConfigError(
            f"tokens: prompt {prompt} has no response {response!r}.", fix=f"use a number from 0 to {len(own) - 1}."
        )
    assert rows.response_mask is not None and rows.input_ids is not None
    columns = rows.response_mask[own[response]].nonzero().squeeze(-1)
    return int(rows.row[own[response]]), columns.tolist(), rows.input_ids[own[response], columns].tolist()


def _token(token: int, tokenizer: TokenTexts | None) -> str:
    """On one line, with blanks and line breaks that can be seen."""
    if tokenizer is None:
        return str(token)
    text = (
        tokenizer.decode([token])
        .replace(" ", "\N{OPEN BOX}")
        .replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    )
    text = escaped(text)
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
