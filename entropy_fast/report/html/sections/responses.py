"""Responses with their tokens coloured by their part in the forecast; those that matter most, where not all fit on a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from entropy_fast.estimates.result import DeltaH1Result, PromptContribution
from entropy_fast.report.html.heat import Legend, legend_of, step_name
from entropy_fast.report.html.intervals import side_of
from entropy_fast.report.html.numbers import plain, short, signed
from entropy_fast.report.html.scales import level_of
from entropy_fast.report.html.sections.prompts import prompt_names
from entropy_fast.report.text import printable, visible
from entropy_fast.run_folder.response_table import SavedResponse, TokenShares

__all__ = ["Piece", "PromptResponses", "ResponseView", "ResponsesSection", "TokenRow", "View", "responses_section"]

TOKEN = 160  # characters of one token
PROMPT = 1500  # of a prompt above its responses
WITHOUT_TOKENS = 3000  # of a response that is not taken apart
COST = 60  # bytes that a token takes on the page beside its text
FOCUSED = 3  # tokens of a response that the keyboard stops at
TOKENS_NAMED = 12  # in the table
OPEN = 3  # prompts whose responses are seen at once
BLANK = "␣"  # for blanks in the table
NO_TEXT = "▫"  # of a token that adds nothing by itself, as all but the last of a character that is spread over several
TITLES = {"direct": "direct part", "visitation": "visitation part", "total": "total"}
Key = tuple[str, int]  # the role of a batch, and a group in it


@dataclasses.dataclass(frozen=True)
class View:
    """One of the two numbers that tokens can be coloured by: its name among `TokenShares`, its title, its colours."""

    part: str
    title: str
    legend: Legend


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token.

    Attributes:
        text: what it adds.
        steps: for every view the step on the colour scale; empty for next to nothing.
        numbers: for every view the share.
        focused: whether the keyboard stops at it.
    """

    text: str
    steps: tuple[str, ...]
    numbers: tuple[str, ...]
    focused: bool


@dataclasses.dataclass(frozen=True)
class ResponseView:
    """One response.

    Attributes:
        row: in the rollouts.
        facts: reward, advantage and length.
        shares: for every view its title, the response's share, and its side.
        pieces: its tokens; empty where shares are not known.
        text: the response where there are no pieces.
    """

    row: int
    facts: str
    shares: tuple[tuple[str, str, str], ...]
    pieces: tuple[Piece, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class PromptResponses:
    """Responses to one prompt.

    Attributes:
        rank: as in the table of prompts; name: likewise.
        role: which of two batches; empty where there is one.
        text: the whole prompt.
        responses: to it; opened: whether they are seen at once.
    """

    rank: int
    role: str
    name: str
    text: str
    responses: tuple[ResponseView, ...]
    opened: bool


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """A token in a table: its text, its prompt's rank, its response's row, its place in it from 1, its share in every view."""

    text: str
    rank: int
    row: int
    place: int
    numbers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ResponsesSection:
    """What of the responses is shown.

    Attributes:
        prompts: with their responses, by rank.
        shown: how many responses; of: how many there are.
        views: that tokens can be coloured by; empty where their shares are not known.
        with_texts: whether there are texts for everything that is shown; else ids of tokens stand for some.
        strongest: tokens that matter most, of all responses.
        why_plain: why tokens are not coloured; empty where they are.
    """

    prompts: tuple[PromptResponses, ...]
    shown: int
    of: int
    views: tuple[View, ...]
    with_texts: bool
    strongest: tuple[TokenRow, ...]
    why_plain: str


def responses_section(
    result: DeltaH1Result, responses: Sequence[SavedResponse] | None, room: int
) -> ResponsesSection | None:
    """None where the responses were not written.

    Args:
        result: they are of.
        responses: in the order of the rollouts.
        room: about how many bytes of the page they may take.
    """
    if not responses:
        return None
    known = [(response, response.shares) for response in responses if response.shares is not None]
    largest = _largest(result, [shares for _, shares in known])
    ranks, names = _ranks(result), _names(result, responses)
    chosen = _that_fit(sorted(responses, key=lambda r: (-_weight(r, result), r.role, r.row)), room)
    grouped: dict[Key, list[SavedResponse]] = {}
    for response in sorted(chosen, key=lambda r: (r.role, r.row)):
        grouped.setdefault((response.role, ranks[response.role, response.group_id]), []).append(response)
    prompts = tuple(
        PromptResponses(
            rank,
            "" if role == "both" else f"{role} batch",
            names[role, own[0].group_id],
            visible(next((r.prompt for r in own if r.prompt is not None), ""), PROMPT),
            tuple(_view(response, largest) for response in own),
            place < OPEN,
        )
        for place, ((role, rank), own) in enumerate(sorted(grouped.items()))
    )
    return ResponsesSection(
        prompts,
        len(chosen),
        len(responses),
        tuple(View(part, TITLES[part], legend_of(size, result.unit)) for part, size in largest.items()),
        not any(map(_by_ids, responses)),
        _strongest(known, ranks, largest),
        "" if known else _why_plain(result),
    )


def _why_plain(result: DeltaH1Result) -> str:
    if result.estimate_options.gradient == "live":
        return "Shares of single tokens are not known for a forecast along the gradient that stood in .grad."
    return "Shares of single tokens were not asked for: a probe with --by-token (RunOptions.by_token) has them."


def _largest(result: DeltaH1Result, known: Sequence[TokenShares]) -> dict[str, float]:
    """The parts that tokens are shown by, with the largest size of a token's share in each."""
    split = result.split is not None
    parts = ("direct", "visitation") if split else ("total",)
    if result.estimate_options.wanted_parts == ("direct",):
        parts = ("direct",)
    found = {part: [abs(x) for shares in known for x in _of(shares, part)] for part in parts}
    return {part: max(sizes) for part, sizes in found.items() if sizes}


def _of(shares: TokenShares, part: str) -> tuple[float, ...]:
    found: tuple[float, ...] | None = getattr(shares, part)
    return found or ()


def _groups(prompt: PromptContribution) -> list[Key]:
    return [(prompt.role, group) for group in prompt.group_ids]


def _ranks(result: DeltaH1Result) -> dict[Key, int]:
    """Rank of every group's unit as the table of prompts has it; one after the last for groups that were left out."""
    found: dict[Key, int] = _Last(len(result.per_prompt) + 1)
    for role in dict.fromkeys(prompt.role for prompt in result.per_prompt):
        ranked = sorted((p for p in result.per_prompt if p.role == role), key=lambda p: -abs(p.delta_h1))
        found |= {key: rank for rank, prompt in enumerate(ranked, start=1) for key in _groups(prompt)}
    return found


def _names(result: DeltaH1Result, responses: Sequence[SavedResponse]) -> dict[Key, str]:
    names, _ = prompt_names(result, responses)
    found: dict[Key, str] = {(r.role, r.group_id): f"group {r.group_id}" for r in responses}
    found |= {key: names[n] for n, prompt in enumerate(result.per_prompt) for key in _groups(prompt)}
    return found


class _Last(dict[Key, int]):
    """A rank for what has none."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def __missing__(self, key: Key) -> int:
        return self._rank


def _weight(response: SavedResponse, result: DeltaH1Result) -> float:
    """How much a response matters: by its tokens, else by its own share, else by its prompt's."""
    if response.shares is not None:
        return abs(sum(response.shares.total))
    by_sequence = (result.by_sequence or {}).get(response.role)
    if by_sequence is not None:
        return abs(float(by_sequence.delta_h1[response.row]))
    shares = [abs(p.delta_h1) for p in result.per_prompt if (response.role, response.group_id) in _groups(p)]
    return max(shares, default=0.0)


def _that_fit(ranked: Sequence[SavedResponse], room: int) -> list[SavedResponse]:
    """As many of the first ones as there is room for; at least one."""
    chosen: list[SavedResponse] = []
    for response in ranked:
        room -= _size(response)
        if room < 0 and chosen:
            break
        chosen.append(response)
    return chosen


def _size(response: SavedResponse) -> int:
    if response.shares is None:
        return 400 + _bytes(_plain_text(response)[:WITHOUT_TOKENS])
    return 500 + COST * len(response.token_ids) + sum(map(_bytes, _texts(response)))


def _bytes(text: str) -> int:
    """On the page, where some characters are written as the names they have there."""
    return len(text.encode()) + 4 * sum(map(text.count, "<>&\"'"))


def _view(response: SavedResponse, largest: Mapping[str, float]) -> ResponseView:
    facts = [f"{len(response.token_ids)} tokens", f"advantage {signed(response.advantage, 2)}"]
    if response.reward is not None:
        facts.insert(0, f"reward {plain(response.reward, 2)}")
    shares = []
    if response.shares is not None:
        sums = {part: sum(_of(response.shares, part)) for part in largest}
        shares = [(TITLES[part], signed(value), side_of(value)) for part, value in sums.items()]
    return ResponseView(
        response.row,
        ", ".join(facts),
        tuple(shares),
        () if response.shares is None else _pieces(response, response.shares, largest),
        visible(_plain_text(response), WITHOUT_TOKENS) if response.shares is None else "",
    )


def _by_ids(response: SavedResponse) -> bool:
    """Whether ids stand for its tokens: it has no text, or is taken apart into tokens without texts."""
    return response.tokens is None and (response.shares is not None or response.response is None)


def _plain_text(response: SavedResponse) -> str:
    return " ".join(_texts(response)) if response.response is None else response.response


def _pieces(response: SavedResponse, shares: TokenShares, largest: Mapping[str, float]) -> tuple[Piece, ...]:
    sizes = [abs(x) for x in shares.total]
    focused = set(sorted(range(len(sizes)), key=lambda n: -sizes[n])[:FOCUSED])
    columns = {part: _of(shares, part) for part in largest}
    return tuple(
        Piece(
            text,
            tuple(step_name(level_of(column[n], largest[part])) for part, column in columns.items()),
            tuple(short(column[n]) for column in columns.values()),
            n in focused,
        )
        for n, text in enumerate(_texts(response))
    )


def _texts(response: SavedResponse) -> list[str]:
    if response.tokens is None:
        return [f"⟨{token}⟩" for token in response.token_ids]
    return [visible(text, TOKEN) or NO_TEXT for text in response.tokens]


def _strongest(
    known: Sequence[tuple[SavedResponse, TokenShares]], ranks: Mapping[Key, int], largest: Mapping[str, float]
) -> tuple[TokenRow, ...]:
    sizes = [(abs(x), place, n) for place, (_, shares) in enumerate(known) for n, x in enumerate(shares.total)]
    rows = []
    for _, place, n in sorted(sizes, key=lambda found: -found[0])[:TOKENS_NAMED]:
        response, shares = known[place]
        rows.append(
            TokenRow(
                printable(_texts(response)[n].replace(" ", BLANK), 40),
                ranks[response.role, response.group_id],
                response.row,
                n + 1,
                tuple(signed(_of(shares, part)[n]) for part in largest),
            )
        )
    return tuple(rows)
