"""verl's dump of a step: texts and scores, one JSON object for every response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from word_tokenizer import word_tokenizer

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from

TOKENIZER = word_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"input": "w0 w1", "output": "w2", "gts": "w2", "score": 1.0, "step": 5, "acc": True},
    {"input": "w3", "output": "w4 w5 w6", "gts": None, "score": 0.5, "step": 5, "acc": False},
    {"input": "w0 w1", "output": "w7 w8", "gts": "w2", "score": 0.0, "step": 5, "acc": False},
]


def test_advantages_are_centred_scores_unless_they_are_given(tmp_path: Path) -> None:
    path = tmp_path / "5.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")
    for batch in (path, ROWS):
        rollouts = rollouts_from("verl_jsonl", batch, tokenizer=TOKENIZER, max_lengths=6)
        assert rollouts.input_ids.tolist() == [[1, 5, 6, 7, 0], [1, 8, 9, 10, 11], [1, 5, 6, 12, 13]]
        assert rollouts.loss_mask.tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
        assert rollouts.group_ids.tolist() == [0, 1, 0]
        assert rollouts.rewards is not None and rollouts.rewards.tolist() == [1.0, 0.5, 0.0]
        assert rollouts.advantages is not None and rollouts.advantages.tolist() == [0.5, 0.0, -0.5]
        assert rollouts.length_budgets.tolist() == [6, 6]
    rollouts = rollouts_from("verl_jsonl", ROWS, tokenizer=TOKENIZER, advantages=[[2.0], [1.0, 2.0, 4.0], [0.0, 3.0]])
    assert rollouts.advantages is not None and rollouts.token_weights is not None
    products = rollouts.advantages.unsqueeze(-1) * rollouts.token_weights
    assert products.tolist() == [[0, 0, 0, 2, 0], [0, 0, 1, 2, 4], [0, 0, 0, 0, 3]]


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(RolloutsError, match=r"verl_jsonl: the batch holds no token ids .*\n.*`tokenizer`"):
        rollouts_from("verl_jsonl", ROWS)
    without = [{key: value for key, value in row.items() if key != "score"} for row in ROWS]
    with pytest.raises(RolloutsError, match=r"no advantages and no rewards \(`score`\).*\n.*`advantages`"):
        rollouts_from("verl_jsonl", without, tokenizer=TOKENIZER)
    with pytest.raises(RolloutsError, match="has no `output`"):
        rollouts_from("verl_jsonl", [{"input": "w0"}], tokenizer=TOKENIZER)
    with pytest.raises(RolloutsError, match="the batch is one mapping; expected rows"):
        rollouts_from("verl_jsonl", ROWS[0], tokenizer=TOKENIZER)
    path = tmp_path / "6.jsonl"
    path.write_text('{"input": "w0"}\nnot json\n')
    with pytest.raises(RolloutsError, match="line 2: it is not JSON"):
        rollouts_from("verl_jsonl", path, tokenizer=TOKENIZER)
