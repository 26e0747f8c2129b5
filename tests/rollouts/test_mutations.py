"""Damaged input, at random from a seed: it reads, or raises an error of this package; nothing else, and not for ever."""

from __future__ import annotations

import copy
import functools
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entropy_fast.errors import EntropyFastError
from entropy_fast.rollouts import Rollouts, read_rollouts, write_rollouts
from entropy_fast.sampling import read_tasks

HANGS_AFTER = 20  # seconds for one case; they take milliseconds
COUNTS = [150, pytest.param(10_000, marks=pytest.mark.exhaustive)]
JUNK: list[Any] = [
    None, True, -1, 0, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", "\ud800", "\x1b[2J", [], [[]], {}, {"a": 1},
    [None], [1, "x"], [0.5], "1" * 50,
]  # fmt: skip
TOKENS = [
    b"null", b"NaN", b"1e999", b"-1", b"9" * 30, b"[" * 2000, b'"', b"\\ud800", b"\xff", b"\x00", b"\n", b"}{", b",", b"{}",
    b"true",
]  # fmt: skip
HOSTILE: list[Any] = [
    *JUNK, torch.tensor(float("nan")), torch.ones(2, 2, 4), torch.ones(2, 2, dtype=torch.bool), torch.ones(3).to_sparse(),
    torch.empty(2, 2, 4, device="meta"), torch.tensor([1j, 2j]), np.array(["a"]), np.array([None]), np.datetime64("2020-01-01"),
    torch.full((2, 2), 1e38), torch.zeros(0), object(), torch.full((2,), 2**62), lambda: 0, b"bytes", {1, 2},
]  # fmt: skip


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(call: Callable[[], object], what: object) -> bool:
    """Whether it raises an error of ours. Any other is a failure of the test, with the case that led to it."""
    try:
        with time_limit():
            call()
    except EntropyFastError as error:
        said = error.problem
    except Exception as error:
        raise AssertionError(f"a foreign {type(error).__name__} ({error}) for {what!r:.2000}") from error
    else:
        return False
    assert said.isprintable(), f"an error that cannot be printed for {what!r:.2000}"
    return True


def sample() -> Rollouts:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [4, 6, 7, 8], [4, 7, 7, 8]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    loss = attention * torch.tensor([0, 1, 1, 1])
    loss[:2, 1] = 0
    return Rollouts(
        ids, attention, loss, torch.tensor([1, 1, 2, 2]), torch.tensor([1.0, -1.0, 0.5, -0.5]), rewards=torch.arange(4.0),
        max_lengths=8, old_logprobs=-torch.ones(4, 4), temperature=1.0, top_p=0.9, prompts=["p", "q"], responses=list("abcd"),
    )  # fmt: skip


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.randint(1, 12)
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = chance.choice(TOKENS)
        elif kind == 3:
            data[at : at + length] = chance.randbytes(length)
        else:
            data[at:at] = data[chance.randrange(len(data) + 1) :][:length]
        if not data:
            return b""
    return bytes(data)


def damaged_value(value: Any, chance: random.Random, junk: list[Any]) -> Any:
    """A row or a list with something in it replaced, dropped or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        change = chance.randrange(4)
        if change == 0:
            del value[key]
        elif change == 1:
            value[chance.choice([key + "x", "reward", "prompt", "input_ids", "\x1b"])] = value[key]
        else:
            value[key] = damaged_value(value[key], chance, junk)
        return value
    if isinstance(value, list) and value and chance.random() < 0.6:
        at = chance.randrange(len(value))
        value[at] = damaged_value(value[at], chance, junk)
        return value
    return chance.choice(junk)


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
        "max_lengths": [8, 8], "old_logprobs": -torch.ones(2, 2, 4), "temperature": 1.0, "top_p": 0.9, "prompts": ["p", "q"],
        "responses": list("abcd"),
    }  # fmt: skip
    assert not refused(lambda: Rollouts.from_dict(batch), "the good batch")
    errors = 0
    for _ in range(count):
        bad: dict[str, Any] = dict(batch)
        for _ in range(chance.randint(1, 2)):
            key = chance.choice(list(batch))
            old = bad[key]
            as_lists = (
                old.tolist()
                if isinstance(old, torch.Tensor) and chance.random() < 0.5
                else HOSTILE[chance.randrange(len(HOSTILE))]
            )
            bad[key] = damaged_value(as_lists, chance, JUNK) if isinstance(as_lists, list) else as_lists
        errors += refused(functools.partial(Rollouts.from_dict, bad), bad)
    assert errors > count // 2, "most damage is seen"
