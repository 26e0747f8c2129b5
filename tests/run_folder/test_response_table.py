"""Every response of a batch is there with its text, its tokens and their shares, wherever its padding is."""

from __future__ import annotations

import dataclasses
import math

import pyarrow as pa
import pytest
import torch
from saved_results import made_result
from small_policy import tokenizer

from entropy_fast import Rollouts
from entropy_fast.errors import ResultError
from entropy_fast.run_folder.response_table import SCHEMA, response_table, responses_of

# Prompts of two and three tokens, padding on either side; a response with a token that is not scored, and an empty one.
IDS = [[1, 3, 4, 5, 6, 0], [3, 4, 7, 13, 8, 1], [5, 6, 7, 9, 10, 0], [5, 6, 7, 1, 1, 1]]
REAL = [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1] * 6, [1, 1, 1, 0, 0, 0]]
SCORED = [[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1], [0] * 6]


def batch(**changes) -> Rollouts:
    fields = {
        "input_ids": torch.tensor(IDS),
        "attention_mask": torch.tensor(REAL),
        "loss_mask": torch.tensor(SCORED),
        "group_ids": torch.tensor([5, 5, 2, 2]),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        **changes,
    }
    return Rollouts(**fields)


def result_with(by_token: torch.Tensor | None):
    found = made_result(2, 2)
    parts = {
        name: dataclasses.replace(getattr(found.split, name), by_token=None if by_token is None else by_token * factor)
        for name, factor in (("direct", 0.25), ("visitation", 0.75))
    }
    forecast = dataclasses.replace(found.forecast, by_token=by_token)
    return dataclasses.replace(
        found, forecast=forecast, split=dataclasses.replace(found.split, total=forecast, **parts)
    )


SHARES = torch.arange(24, dtype=torch.float64).reshape(4, 6) / 7


def test_rows_tokens_and_shares():
    table = response_table(result_with(SHARES), {"both": batch()}, tokenizer())
    assert table.schema.equals(SCHEMA)
    found = responses_of(table)
    assert [(r.role, r.row, r.group_id, r.reward, r.advantage) for r in found] == [
        ("both", 0, 5, 1.0, 0.5),
        ("both", 1, 5, 0.0, -0.5),
        ("both", 2, 2, 1.0, 0.5),
        ("both", 3, 2, 0.0, -0.5),
    ]
    assert [r.token_ids for r in found] == [(5, 6, 0), (7, 8), (9, 10, 0), ()]
    for response, mask, shares in zip(found, SCORED, SHARES, strict=True):
        expected = shares[torch.tensor(mask) == 1]
        assert response.shares.total == tuple(expected.tolist())
        assert response.shares.direct == tuple((0.25 * expected).tolist())
        assert response.shares.visitation == tuple((0.75 * expected).tolist())
    decode = tokenizer().decode
    assert [r.prompt for r in found] == [decode([3, 4])] * 2 + [decode([5, 6, 7])] * 2
    assert [r.response for r in found] == [decode([5, 6, 0]), decode([7, 8]), decode([9, 10, 0]), decode([])]
    assert ["".join(r.tokens).strip() for r in found if r.row != 1] == [r.response.strip() for r in found if r.row != 1]
    assert all(len(r.tokens) == len(r.token_ids) for r in found)


def test_texts_of_the_rollouts_are_kept_and_nothing_is_made_up():
    given = batch(prompts=["p <b>", "q"], responses=["w", "x", "y", ""], rewards=None, advantages=torch.ones(4))
    found = responses_of(response_table(result_with(None), {"both": given}))
    assert [(r.prompt, r.response, r.reward, r.tokens, r.shares) for r in found] == [
        ("p <b>", "w", None, None, None),
        ("p <b>", "x", None, None, None),
        ("q", "y", None, None, None),
        ("q", "", None, None, None),
    ]
    bare = responses_of(response_table(result_with(None), {"both": batch()}))
    assert {(r.prompt, r.response, r.tokens) for r in bare} == {(None, None, None)}


def test_two_batches_have_shares_on_the_entropy_side_alone():
    update = dataclasses.replace(batch(), group_ids=torch.tensor([0, 0, 1, 1]))
    found = responses_of(response_table(result_with(SHARES), {"entropy": batch(), "update": update}))
    assert [r.role for r in found] == ["entropy"] * 4 + ["update"] * 4
    assert [r.shares is None for r in found] == [False] * 4 + [True] * 4
    assert [r.group_id for r in found[4:]] == [0, 0, 1, 1]


def test_shares_of_another_batch_are_an_error():
    with pytest.raises(ResultError, match=r"shares of tokens \(total\) are \[4, 5\], and the both batch is \[4, 6\]"):
        response_table(result_with(SHARES[:, :5]), {"both": batch()})


def test_unknown_numbers_stay_unknown():
    shares = SHARES.clone()
    shares[0, 3] = math.nan
    found = responses_of(response_table(result_with(shares), {"both": batch()}))
    assert math.isnan(found[0].shares.total[0])


@pytest.mark.parametrize("name", ["tokens", "total", "direct", "visitation"])
def test_lists_that_do_not_fit_are_named(name):
    table = response_table(result_with(SHARES), {"both": batch()}, tokenizer())
    rows = table.to_pylist()
    rows[1][name] = rows[1][name][:-1]
    with pytest.raises(ResultError, match=f"`{name}` of row 1 .* has 1 entries for 2 tokens"):
        responses_of(pa.Table.from_pylist(rows, schema=SCHEMA))


def test_another_table_is_refused():
    with pytest.raises(ResultError, match="has columns"):
        responses_of(pa.table({"role": ["both"]}))
