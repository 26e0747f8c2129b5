"""Damaged input, at random from a seed: it reads, or raises an error of this package; nothing else, and not for ever."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import JUNK, damaged_bytes, damaged_value, refused

from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts, read_rollouts, write_rollouts
from entropy_fast.sampling import read_tasks

COUNTS = [150, pytest.param(10_000, marks=pytest.mark.exhaustive)]
HOSTILE: list[Any] = [
    *JUNK, torch.tensor(float("nan")), torch.ones(2, 2, 4), torch.ones(2, 2, dtype=torch.bool), torch.ones(3).to_sparse(),
    torch.empty(2, 2, 4, device="meta"), torch.tensor([1j, 2j]), np.array(["a"]), np.array([None]), np.datetime64("2020-01-01"),
    torch.full((2, 2), 1e38), torch.zeros(0), object(), torch.full((2,), 2**62), lambda: 0, b"bytes", {1, 2},
]  # fmt: skip


def sample() -> Rollouts:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [4, 6, 7, 8], [4, 7, 7, 8]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    loss = attention * torch.tensor([0, 1, 1, 1])
    loss[:2, 1] = 0
    return Rollouts(
        ids, attention, loss, torch.tensor([1, 1, 2, 2]), torch.tensor([1.0, -1.0, 0.5, -0.5]), rewards=torch.arange(4.0),
        max_lengths=8, old_logprobs=-torch.ones(4, 4), temperature=1.0, top_p=0.9, top_k=5, min_p=0.1,
        prompts=["p", "q"], responses=list("abcd"),
    )  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tasks"])
def test_damaged_bytes(tmp_path: Path, kind: str, count: int) -> None:
    chance = random.Random(f"{kind} bytes")
    path = tmp_path / f"r.{'jsonl' if kind == 'tasks' else kind}"
    if kind == "tasks":
        path.write_text('{"prompt": "2 + 3", "answer": "5"}\n{"prompt": "a\u2028b"}\n', encoding="utf-8")
    else:
        write_rollouts(sample(), path)
    read: Callable[[Path], object] = read_tasks if kind == "tasks" else read_rollouts
    good, errors = path.read_bytes(), 0
    assert not refused(lambda: read(path), "the good file")
    for _ in range(count):
        bad = damaged_bytes(good, chance)
        path.write_bytes(bad)
        errors += refused(lambda: read(path), bad)
    assert errors > count // 4, "most damage is seen"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["rollouts", "tasks"])
def test_damaged_rows(tmp_path: Path, kind: str, count: int) -> None:
    chance = random.Random(f"{kind} rows")
    path = tmp_path / "r.jsonl"
    rows: list[Any] = [{"prompt": "2 + 3", "answer": "5"}, {"prompt": "1"}]
    if kind == "rollouts":
        write_rollouts(sample(), path)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    read: Callable[[Path], object] = read_tasks if kind == "tasks" else read_rollouts
    errors = 0
    for _ in range(count):
        bad = damaged_value(copy.deepcopy(rows), chance, JUNK)
        path.write_text("\n".join(json.dumps(row) for row in (bad if isinstance(bad, list) else [bad])))
        errors += refused(lambda: read(path), bad)
    assert errors > count // 2, "most damage is seen"


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_padded_batches(count: int) -> None:
    chance = random.Random("from_dict")
    whole = sample()
    batch: dict[str, Any] = {
        "sequences": whole.input_ids.view(2, 2, 4), "attention_masks": whole.attention_mask.view(2, 2, 4),
        "prompt_lens": torch.tensor([2, 1]), "advantages": torch.tensor([[1.0, -1.0], [0.5, -0.5]]),
        "rewards": torch.ones(2, 2),
        "max_lengths": [8, 8], "old_logprobs": -torch.ones(2, 2, 4), "temperature": 1.0, "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "prompts": ["p", "q"],
        "responses": list("abcd"),
    }  # fmt: skip
    assert not refused(lambda: Rollouts.from_dict(batch), "the good batch")
    errors = 0
    for _ in range(count):
        bad: dict[str, Any] = dict(batch)
        for _ in range(chance.randint(1, 2)):
            key = chance.choice(list(batch))
            old = batch[key]
            as_lists = (
                old.tolist()
                if isinstance(old, torch.Tensor) and chance.random() < 0.5
                else HOSTILE[chance.randrange(len(HOSTILE))]
            )
            bad[key] = damaged_value(as_lists, chance, JUNK) if isinstance(as_lists, list) else as_lists
        errors += refused(functools.partial(Rollouts.from_dict, bad), bad)
    assert errors > count // 2, "most damage is seen"


def test_a_list_that_holds_itself() -> None:
    ids: list[Any] = [[1, 2], [3]]
    ids[1].append(ids)
    with pytest.raises(RolloutsError, match="nested more than 3 deep"):
        Rollouts(ids, torch.ones(2, 2), torch.ones(2, 2), [0, 0], [1.0, -1.0])  # type: ignore[arg-type]
