"""Prompts are ranked by their share, in both roles, and are called so that they can be told apart."""

from __future__ import annotations

import dataclasses

from saved_results import made_responses, made_result

from entropy_fast.report.html.numbers import signed
from entropy_fast.report.html.sections import prompts as section
from entropy_fast.report.html.sections.prompts import prompt_names, prompts_section


def test_ranks_and_numbers():
    result = made_result(5)
    [table] = prompts_section(result, None).tables
    ranked = sorted(result.per_prompt, key=lambda p: -abs(p.delta_h1))
    assert [row.rank for row in table.first] == [1, 2, 3, 4, 5]
    assert [row.share for row in table.first] == [signed(p.delta_h1) for p in ranked]
    assert [row.as_update for row in table.first] == [signed(p.as_update, 2) for p in ranked]
    assert [row.text for row in table.first] == [f"What is {p.group_ids[0]}?" for p in ranked]
    assert table.of == "at this prompt"
    assert table.total[0] == signed(result.delta_h1)
    assert table.total[2] == signed(sum(p.as_update for p in ranked))
    assert not table.with_entropy  # along the whole step it is the share itself
    for row, prompt in zip(table.first, ranked, strict=True):
        ends = row.bar.start, row.bar.start + row.bar.width
        assert table.zero in (ends[0], round(ends[1], 2))
        assert row.bar.side == ("lowers" if prompt.delta_h1 < 0 else "raises")


def test_what_all_begin_with_is_left_out_once_it_is_long():
    long = made_result(3, text=lambda n, i: f"Solve the following multiplication, please: {n} * {n}\nGo on.")
    found = prompts_section(long, None)
    assert found.shared == "Solve the following multiplication, please:"
    assert sorted(row.text for row in found.tables[0].first) == [f"…{n} * {n} Go on." for n in range(3)]
    short = prompts_section(made_result(3), None)
    assert short.shared == ""
    same = made_result(3, text=lambda n, i: "The very same words, for every prompt of the batch")
    assert prompt_names(same, None)[0] == ("The very same words, for every prompt of the batch",) * 3


def test_texts_come_from_the_responses_where_the_rollouts_have_none():
    result = made_result(3, text=lambda n, i: None)
    assert prompt_names(result, None)[0] == ("group 0", "group 1", "group 2")
    assert prompt_names(result, made_responses(3))[0] == tuple(f"What is {n}?" for n in range(3))
    blocks = dataclasses.replace(result.per_prompt[0], group_ids=(0, 2))
    named = dataclasses.replace(result, per_prompt=(blocks,))
    assert prompt_names(named, made_responses(3))[0] == ("What is 0? What is 2?",)
    assert prompt_names(named, made_responses(1))[0] == ("group 0, 2",)


def test_two_batches_have_a_table_each():
    result = made_result(4)
    entropy, update = (
        [dataclasses.replace(p, role=role, **{lost: None}) for p in result.per_prompt]
        for role, lost in (("entropy", "as_update"), ("update", "as_entropy"))
    )
    found = prompts_section(dataclasses.replace(result, per_prompt=(*entropy, *update)), None)
    assert [(table.title, table.of, len(table.first)) for table in found.tables] == [
        ("Prompts of the entropy batch", "at this prompt", 4),
        ("Prompts of the update batch", "by its update", 4),
    ]
    assert [table.total[1:].index("") for table in found.tables] == [1, 0]
    assert not found.means


def test_without_the_whole_step_a_share_is_the_mean_of_both():
    found = prompts_section(made_result(4, step_parts={}), None)
    assert found.means and found.tables[0].of == "share"


def test_most_rows_are_folded_away_and_the_least_left_out(monkeypatch):
    monkeypatch.setattr(section, "MOST", 20)
    [table] = prompts_section(made_result(23), None).tables
    assert (len(table.first), len(table.rest), table.left_out) == (12, 8, 3)
    assert [row.rank for row in (*table.first, *table.rest)] == list(range(1, 21))
