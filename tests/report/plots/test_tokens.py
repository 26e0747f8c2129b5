"""Bars are the shares of one response's tokens, in their order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from artists import columns, texts
from shown_results import bare, full, rollouts

from entropy_fast.errors import ConfigError, ResultError
from entropy_fast.estimates.response_rows import ResponseRows

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


class Words:
    def decode(self, ids):
        [token] = ids
        return f" w{token}\u202e\n"


def test_every_response_of_every_prompt():
    result, batch = full(), rollouts()
    for prompt, unit in enumerate(result.per_prompt):
        counted = (batch.group_ids == unit.group_ids[0]) & (batch.loss_mask.sum(-1) > 0)
        for response, row in enumerate(counted.nonzero().squeeze(-1).tolist()):
            ax = result.plot.tokens(prompt, response, "direct")
            mask = batch.loss_mask[row] == 1
            drawn = columns(ax)
            assert [x for x, _ in drawn] == pytest.approx(range(int(mask.sum())))
            assert [height for _, height in drawn] == result.split.direct.by_token[row, mask].tolist()
            shown = [label.get_text() for label in ax.get_xticklabels()]
            assert shown == [str(token) for token in batch.input_ids[row, mask].tolist()]
            assert "direct" in ax.get_ylabel() and result.unit in ax.get_ylabel()


def test_texts_of_tokens_show_their_blanks_and_do_nothing():
    ax = full().plot.tokens(0, 0, tokenizer=Words())
    first = ax.get_xticklabels()[0].get_text()
    assert first.startswith("␣w") and first.endswith("\\u202e↵")
    ax.figure.canvas.draw()


def test_of_a_long_response_the_largest_are_named():
    result, length = full(), 200
    shares = torch.linspace(-1, 1, length, dtype=torch.float64)[None]
    ids, mask = torch.arange(length)[None], torch.ones(1, length, dtype=torch.bool)
    one = torch.zeros(1, dtype=torch.int64)
    long = dataclasses.replace(
        result,
        forecast=dataclasses.replace(result.forecast, by_token=shares),
        response_rows={"both": ResponseRows(one, one, one, ids, mask)},
    )
    ax = long.plot.tokens(0, 0)
    named = {text.get_text() for text in ax.texts}
    assert {"0", "199"} <= named and not {"90", "100", "110"} & named
    assert len(columns(ax)) == length


def test_which_are_there_is_said():
    with pytest.raises(ConfigError, match="no prompt 9"):
        full().plot.tokens(9, 0)
    with pytest.raises(ConfigError, match=r"no response 5.*\n.*from 0 to"):
        full().plot.tokens(0, 5)
    with pytest.raises(ConfigError, match="no response -1"):
        full().plot.tokens(0, -1)
    with pytest.raises(ResultError, match="by_token=True"):
        bare().plot.tokens(0, 0)


def test_whose_response_it_is_stands_above():
    assert "response 1 to prompt 2" in texts(full().plot.tokens(2, 1).figure)
