"""open-instruct's saved rollouts: one record of token ids for every response."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from reader_cases import OLD, PLAIN, Case, assert_same, cases

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers import rollouts_from


def records(case: Case) -> list[dict[str, Any]]:
    return [
        {
            "step": 7,
            "sample_idx": row,
            "prompt_idx": case.groups[row],
            "prompt_tokens": case.prompts[row],
            "response_tokens": case.responses[row],
            "reward": float(row),
            "advantage": case.by_sequence(0.5)[row],
            "finish_reason": "stop",
            "dataset": "sums",
            "logprobs": case.numbers(OLD)[row],
        }
        for row in range(len(case))
    ]


def whole(case: Case) -> Case:
    return Case(case.prompts, case.responses, [[1] * len(row) for row in case.responses], case.groups)


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_every_number_stands_in_the_column_of_its_token(case: Case) -> None:
    for batch in (records(case), [SimpleNamespace(**row) for row in records(case)]):
        rollouts = rollouts_from("open_instruct_records", batch)
        assert_same(rollouts, whole(case), old=case.numbers(OLD), advantages=case.by_sequence(0.5))
        assert rollouts.group_ids.tolist() == case.groups


def test_a_file_and_records_without_log_probs(tmp_path: Path) -> None:
    path = tmp_path / "run_rollouts_000000.jsonl"
    rows = [row | {"logprobs": None} for row in records(PLAIN)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollouts = rollouts_from("open_instruct_records", path, temperature=0.8)
    assert rollouts.temperature == 0.8
    assert_same(rollouts, whole(PLAIN), advantages=PLAIN.by_sequence(0.5))


def test_a_shard_of_several_steps_is_refused() -> None:
    rows = records(PLAIN)
    rows[-1]["step"] = 8
    with pytest.raises(RolloutsError, match=r"the rows are of 2 steps \(7, 8\)"):
        rollouts_from("open_instruct_records", rows)


def test_log_probs_of_another_length_are_named() -> None:
    rows = records(PLAIN)
    rows[0]["logprobs"] = [-1.0]
    with pytest.raises(RolloutsError, match=r"`logprobs` has shape \[1\]; expected \[2\]"):
        rollouts_from("open_instruct_records", rows)
