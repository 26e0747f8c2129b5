"""TRL's table of completions: texts or conversations, with advantages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from word_tokenizer import word_tokenizer

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from

TOKENIZER = word_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"step": 5, "prompt": "w0 w1", "completion": "w2", "accuracy": 1.0, "advantage": 0.5},
    {"step": 5, "prompt": "w3", "completion": "w4 w5 w6", "accuracy": 0.0, "advantage": 0.0},
    {"step": 5, "prompt": "w0 w1", "completion": "w7 w8", "accuracy": 0.0, "advantage": -0.5},
]


def chats() -> list[dict[str, Any]]:
    return [
        row
        | {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in ROWS
    ]


def test_texts_become_tokens_with_what_the_tokenizer_puts_in_front(tmp_path: Path) -> None:
    path = tmp_path / "completions_00005.parquet"
    pd.DataFrame(ROWS).to_parquet(path)
    for batch in (path, str(path), ROWS, pd.DataFrame(ROWS)):
        rollouts = rollouts_from("trl_completions", batch, tokenizer=TOKENIZER, temperature=0.9)
        assert rollouts.input_ids.tolist() == [[1, 5, 6, 7, 0], [1, 8, 9, 10, 11], [1, 5, 6, 12, 13]]
        assert rollouts.loss_mask.tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
        assert rollouts.group_ids.tolist() == [0, 1, 0]
        assert rollouts.advantages is not None and rollouts.advantages.tolist() == [0.5, 0.0, -0.5]
        assert rollouts.prompts == ("w0 w1", "w3") and rollouts.responses is not None
        assert rollouts.temperature == 0.9


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "completions_00005.parquet"
    pq.write_table(pa.Table.from_pylist(chats()), path)
    for batch in (path, chats()):
        rollouts = rollouts_from("trl_completions", batch, tokenizer=TOKENIZER)
        assert rollouts.input_ids[0].tolist() == [1, 3, 5, 6, 4, 7, 0]
        assert rollouts.loss_mask[0].tolist() == [0, 0, 0, 0, 0, 1, 0]
        assert rollouts.group_ids.tolist() == [0, 1, 0]


def test_groups_and_advantages_of_the_caller_come_first() -> None:
    rollouts = rollouts_from("trl_completions", ROWS, tokenizer=TOKENIZER, groups=["a", "b", "c"], advantages=[1, 2, 3])
    assert rollouts.group_ids.tolist() == [0, 1, 2]
    assert rollouts.advantages is not None and rollouts.advantages.tolist() == [1.0, 2.0, 3.0]


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(RolloutsError, match=r"no token ids .*\n.*`tokenizer`"):
        rollouts_from("trl_completions", ROWS)
    with pytest.raises(RolloutsError, match=r"no advantages .*`advantage`.*\n.*`advantages`"):
        rollouts_from("trl_completions", [row | {"advantage": None} for row in ROWS], tokenizer=TOKENIZER)
    with pytest.raises(RolloutsError, match=r"rows are of 2 steps \(5, 6\)"):
        rollouts_from("trl_completions", [ROWS[0], ROWS[1] | {"step": 6}], tokenizer=TOKENIZER)
    two = [{"role": "assistant", "content": "w1"}, {"role": "tool", "content": "w2"}]
    with pytest.raises(RolloutsError, match="completion of row 0 is a conversation of 2 messages"):
        rollouts_from("trl_completions", [ROWS[0] | {"completion": two}], tokenizer=TOKENIZER)
    with pytest.raises(RolloutsError, match="cannot be read"):
        rollouts_from("trl_completions", tmp_path / "gone.parquet", tokenizer=TOKENIZER)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(RolloutsError, match="cannot be read"):
        rollouts_from("trl_completions", tmp_path / "cut.parquet", tokenizer=TOKENIZER)
    with pytest.raises(RolloutsError, match=r"neither \.jsonl nor \.parquet"):
        rollouts_from("trl_completions", tmp_path / "table.csv", tokenizer=TOKENIZER)
