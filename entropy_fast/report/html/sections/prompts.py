"""Prompts by their share in the forecast, in both roles: as ones whose entropy changes, and as ones whose update changes it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from entropy_fast.estimates.attribution import Role
from entropy_fast.estimates.result import DeltaH1Result, PromptContribution
from entropy_fast.report.html.intervals import side_of
from entropy_fast.report.html.numbers import plain, signed
from entropy_fast.report.html.scales import Axis, axis_over
from entropy_fast.report.text import printable
from entropy_fast.run_folder.response_table import SavedResponse

__all__ = ["Bar", "PromptRow", "PromptTable", "PromptsSection", "prompt_names", "prompts_section"]

TEXT = 220  # characters of a prompt in a row
SHARED = 24  # a beginning that all prompts share is left out from so many characters on
OPEN = 12  # rows that are seen at once
MOST = 200  # rows of a table
AT, BY_UPDATE = "at this prompt", "by its update"
TITLES = {
    "both": "Prompts",
    "entropy": "Prompts of the entropy batch",
    "update": "Prompts of the update batch",
}


@dataclasses.dataclass(frozen=True)
class Bar:
    """A number as a bar from 0: its beginning and width in percent of an axis, and its side."""

    start: float
    width: float
    side: str


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One unit of the batch.

    Attributes:
        rank: from 1, by the size of its share.
        text: without what all prompts begin with.
        share: of the forecast; bar: the same drawn.
        as_entropy: by its own entropy; as_update: by what its update does to the others'. Empty where not known.
        reward: mean; empty where there is none.
        length: mean of its responses, tokens.
        advantage: mean size.
    """

    rank: int
    text: str
    share: str
    bar: Bar
    as_entropy: str
    entropy_bar: Bar | None
    as_update: str
    update_bar: Bar | None
    reward: str
    length: str
    advantage: str


@dataclasses.dataclass(frozen=True)
class PromptTable:
    """Of one batch.

    Attributes:
        title: which.
        first: rows that are seen at once; rest: others; left_out: how many more there are.
        zero: where 0 is on the axis of the bars, in percent.
        of: what a share is; total: of all prompts together, in the columns of the shares.
        with_entropy: whether shares by entropy are known; with_update: by update; with_rewards: whether there are rewards.
    """

    title: str
    first: tuple[PromptRow, ...]
    rest: tuple[PromptRow, ...]
    left_out: int
    zero: float
    of: str
    total: tuple[str, str, str]
    with_entropy: bool
    with_update: bool
    with_rewards: bool


@dataclasses.dataclass(frozen=True)
class PromptsSection:
    """All prompts.

    Attributes:
        tables: one, or one for each of two batches.
        shared: what all of them begin with, and which their texts are without; empty for nothing.
        means: whether shares are the mean of those by entropy and by update.
        whole_step: whether shares are along the optimizer's whole step, of which momentum and decay are no prompt's update.
    """

    tables: tuple[PromptTable, ...]
    shared: str
    means: bool
    whole_step: bool


def prompts_section(result: DeltaH1Result, responses: Sequence[SavedResponse] | None) -> PromptsSection:
    """Of any result; texts that the rollouts lack are taken from the responses, where there was a tokenizer."""
    texts, shared = prompt_names(result, responses)
    tables = []
    for role in dict.fromkeys(prompt.role for prompt in result.per_prompt):
        own = [(prompt, texts[n]) for n, prompt in enumerate(result.per_prompt) if prompt.role == role]
        means = role == "both" and not result.step_parts
        tables.append(_table(TITLES[role], own, "share" if means else BY_UPDATE if role == "update" else AT))
    means = any(table.of == "share" for table in tables)
    return PromptsSection(tuple(tables), printable(shared, TEXT), means, bool(result.step_parts))


def prompt_names(result: DeltaH1Result, responses: Sequence[SavedResponse] | None) -> tuple[tuple[str, ...], str]:
    """What every unit is called on the page, in the order of ``per_prompt``, and what was left out of all of them."""
    known: dict[tuple[Role, int], str] = {}
    for response in responses or ():
        if response.prompt is not None:
            known[response.role, response.group_id] = response.prompt
    raw = [_text(prompt, known) for prompt in result.per_prompt]
    texts = [text for text in raw if text is not None]
    shared = _beginning([" ".join(text.split()) for text in texts])
    names = []
    for prompt, text in zip(result.per_prompt, raw, strict=True):
        if text is None:
            names.append(f"group {', '.join(map(str, prompt.group_ids))}")
            continue
        rest = " ".join(text.split())[len(shared) :]
        names.append(printable(f"…{rest}" if shared else rest, TEXT))
    return tuple(names), shared


def _beginning(texts: Sequence[str]) -> str:
    """Whole words that all texts begin with, where these are worth leaving out."""
    if len(texts) < 2:
        return ""
    alike = next((n for n, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), 0)
    shared = texts[0][:alike]
    shared = shared[: shared.rfind(" ") + 1]
    return shared if len(shared) >= SHARED else ""


def _text(prompt: PromptContribution, known: dict[tuple[Role, int], str]) -> str | None:
    if prompt.prompt is not None:
        return prompt.prompt
    found = [known.get((prompt.role, group)) for group in prompt.group_ids]
    texts = [text for text in found if text is not None]
    return "\n".join(texts) if texts and len(texts) == len(found) else None


def _table(title: str, prompts: Sequence[tuple[PromptContribution, str]], of: str) -> PromptTable:
    ranked = sorted(prompts, key=lambda own: -abs(own[0].delta_h1))
    numbers = [x for p, _ in ranked for x in (p.delta_h1, p.as_entropy, p.as_update) if x is not None]
    axis = axis_over(numbers)
    rows = tuple(_row(rank, prompt, text, axis) for rank, (prompt, text) in enumerate(ranked[:MOST], start=1))
    whose = [prompt for prompt, _ in ranked]
    return PromptTable(
        title,
        rows[:OPEN] if len(rows) > OPEN + 2 else rows,
        rows[OPEN:] if len(rows) > OPEN + 2 else (),
        len(ranked) - len(rows),
        axis.zero,
        of,
        _total(whose),
        any(p.as_entropy is not None and p.as_entropy != p.delta_h1 for p in whose),
        any(p.as_update is not None and p.as_update != p.delta_h1 for p in whose),
        any(p.mean_reward is not None for p in whose),
    )


def _row(rank: int, prompt: PromptContribution, text: str, axis: Axis) -> PromptRow:
    return PromptRow(
        rank,
        text,
        signed(prompt.delta_h1),
        _bar(prompt.delta_h1, axis),
        *_number(prompt.as_entropy, axis),
        *_number(prompt.as_update, axis),
        "" if prompt.mean_reward is None else plain(prompt.mean_reward, 2),
        plain(prompt.mean_response_length),
        plain(prompt.mean_abs_advantage, 2),
    )


def _number(value: float | None, axis: Axis) -> tuple[str, Bar | None]:
    return ("", None) if value is None else (signed(value, 2), _bar(value, axis))


def _total(prompts: Sequence[PromptContribution]) -> tuple[str, str, str]:
    shares = signed(sum(prompt.delta_h1 for prompt in prompts))
    return shares, _sum([prompt.as_entropy for prompt in prompts]), _sum([prompt.as_update for prompt in prompts])


def _sum(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return signed(sum(known)) if known else ""


def _bar(value: float, axis: Axis) -> Bar:
    if math.isnan(value):
        return Bar(axis.zero, 0.0, "")
    start, end = sorted((axis.zero, axis.place(value)))
    return Bar(start, round(end - start, 2), side_of(value))
