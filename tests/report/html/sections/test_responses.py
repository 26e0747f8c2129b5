"""Responses on the page: which ones, in which order, with which numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
from saved_results import made_responses, made_result

from entropy_fast.config import EstimateOptions
from entropy_fast.report.html.numbers import short, signed
from entropy_fast.report.html.scales import LEVELS
from entropy_fast.report.html.sections.responses import TOKEN, responses_section

ROOM = 10**9


def views(section):
    return [response for prompt in section.prompts for response in prompt.responses]


def test_every_token_has_its_two_numbers():
    result, responses = made_result(4), made_responses(4)
    found = responses_section(result, responses, ROOM)
    assert (found.shown, found.of, found.why_plain) == (12, 12, "")
    assert [view.part for view in found.views] == ["direct", "visitation"]
    largest = {
        part: max(abs(x) for r in responses for x in getattr(r.shares, part)) for part in ("direct", "visitation")
    }
    assert [view.legend.marks[-1] for view in found.views] == [signed(x, 2) for x in largest.values()]
    for view in views(found):
        response = responses[view.row]
        for n, piece in enumerate(view.pieces):
            numbers = response.shares.direct[n], response.shares.visitation[n]
            assert piece.numbers == tuple(map(short, numbers))
            for step, number, top in zip(piece.steps, numbers, largest.values(), strict=True):
                assert step[:1] in ("", "l" if number < 0 else "r")
                assert int(step[1:] or 0) == round(LEVELS * math.sqrt(abs(number) / top))
        assert [share for _, share, _ in view.shares] == [
            signed(sum(response.shares.direct)), signed(sum(response.shares.visitation))
        ]  # fmt: skip
        strongest = sorted(range(6), key=lambda n: -abs(response.shares.total[n]))[:3]
        assert sorted(strongest) == [n for n, piece in enumerate(view.pieces) if piece.focused]


def test_prompts_stand_in_the_order_of_their_rank():
    result = made_result(4)
    found = responses_section(result, made_responses(4), ROOM)
    by_share = sorted(range(4), key=lambda n: -abs(result.per_prompt[n].delta_h1))
    assert [prompt.rank for prompt in found.prompts] == [1, 2, 3, 4]
    assert [prompt.text for prompt in found.prompts] == [f"What is {n}?" for n in by_share]
    assert [prompt.opened for prompt in found.prompts] == [True, True, True, False]
    assert [[r.row for r in prompt.responses] for prompt in found.prompts] == [
        [3 * n, 3 * n + 1, 3 * n + 2] for n in by_share
    ]


def test_where_there_is_little_room_those_that_matter_most_are_shown():
    responses = made_responses(4)
    everything = responses_section(made_result(4), responses, ROOM)
    found = responses_section(made_result(4), responses, 5 * (500 + 6 * 66))
    assert found.shown == 5 and everything.shown == 12
    weights = sorted(range(12), key=lambda row: -abs(sum(responses[row].shares.total)))
    assert sorted(view.row for view in views(found)) == sorted(weights[:5])
    assert responses_section(made_result(4), responses, 0).shown == 1


def test_the_strongest_tokens_are_named():
    responses = made_responses(4, piece=lambda i, t: f" a b{i}")
    found = responses_section(made_result(4), responses, 1)
    assert len(found.strongest) == 12
    sizes = sorted((abs(x) for r in responses for x in r.shares.total), reverse=True)
    first = found.strongest[0]
    response = responses[first.row]
    assert abs(response.shares.total[first.place - 1]) == sizes[0]
    assert first.text == f"␣a␣b{first.row}"
    assert first.numbers == (
        signed(response.shares.direct[first.place - 1]), signed(response.shares.visitation[first.place - 1])
    )  # fmt: skip


def without_shares(responses, **changes):
    return [dataclasses.replace(r, shares=None, **changes) for r in responses]


def test_without_shares_texts_stand_plain_and_why_is_said():
    responses = without_shares(made_responses(4), response="a\u202eb\nc")
    found = responses_section(made_result(4), responses, ROOM)
    assert found.views == () and "--by-token" in found.why_plain
    assert {view.text for view in views(found)} == {"a\\u202eb⏎\nc"}
    live = made_result(4, estimate_options=EstimateOptions(gradient="live", step="next"))
    assert ".grad" in responses_section(live, responses, ROOM).why_plain
    bare = without_shares(made_responses(4), response=None, tokens=None)
    found = responses_section(made_result(4), bare, ROOM)
    assert not found.with_texts
    assert views(found)[0].text == "⟨0⟩ ⟨1⟩ ⟨2⟩ ⟨3⟩ ⟨4⟩ ⟨5⟩"


def test_which_numbers_tokens_have_follows_what_was_asked():
    responses = made_responses(4)
    alone = [dataclasses.replace(r, shares=dataclasses.replace(r.shares, visitation=None)) for r in responses]
    direct = made_result(4, estimate_options=EstimateOptions(parts=("direct",)))
    assert [view.part for view in responses_section(direct, alone, ROOM).views] == ["direct"]
    score = made_result(4, split=None)
    assert [view.part for view in responses_section(score, responses, ROOM).views] == ["total"]


@pytest.mark.parametrize(
    ("piece", "shown"), [("", "▫"), ("x" * 10_000, f"{'x' * TOKEN}… (10,000 characters)"), ("\x00", "\\x00")]
)
def test_odd_tokens(piece, shown):
    found = responses_section(made_result(4), made_responses(4, piece=lambda i, t: piece), ROOM)
    assert {p.text for view in views(found) for p in view.pieces} == {shown}


def test_groups_that_were_left_out_come_last():
    responses = [*made_responses(2), dataclasses.replace(made_responses(1, 1)[0], group_id=77, row=99, prompt="lost")]
    found = responses_section(made_result(2), responses, ROOM)
    assert [prompt.text for prompt in found.prompts][-1] == "lost"
    assert found.prompts[-1].name == "group 77"


def test_nothing_of_responses_is_no_section():
    assert responses_section(made_result(), None, ROOM) is None
    assert responses_section(made_result(), (), ROOM) is None


def test_ids_stand_for_tokens_where_they_have_no_texts():
    responses = made_responses(4)
    assert responses_section(made_result(4), responses, ROOM).with_texts
    bare = [dataclasses.replace(r, tokens=None) for r in responses]
    found = responses_section(made_result(4), bare, ROOM)
    assert not found.with_texts
    assert views(found)[0].pieces[3].text == "⟨3⟩"
    assert responses_section(made_result(4), without_shares(bare), ROOM).with_texts  # the response's own text is shown
