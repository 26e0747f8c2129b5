"""The padded [B, G, T] form: the same as flat rows, and where responses start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts_tensors import tensors

from entropy_fast.rollouts.container import Rollouts


@settings(deadline=None)
@given(data=st.data(), b=st.integers(1, 3), g=st.integers(1, 3), prompt=st.integers(1, 4), width=st.integers(0, 4))
def test_the_padded_form_equals_the_flat_one(data: st.DataObject, b: int, g: int, prompt: int, width: int) -> None:
    def draw_integers(low: int, high: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    prompt_sizes = draw_integers(1, prompt, b)  # left padding up to the column `prompt`
    prompt_sizes[0] = prompt  # padders pad to the longest
    sizes = torch.tensor(draw_integers(0, width, b * g)).reshape(b, g, 1)
    columns = torch.arange(prompt + width)
    starts = prompt - torch.tensor(prompt_sizes)[:, None, None]
    masks = ((columns >= starts) & (columns < prompt + sizes)).long()
    prompts = torch.tensor(draw_integers(0, 9, b * prompt)).reshape(b, 1, prompt).expand(b, g, prompt)
    answers = torch.tensor(draw_integers(0, 9, b * g * width), dtype=torch.int64).reshape(b, g, width)
    sequences = torch.cat([prompts, answers], -1)
    advantages = torch.arange(float(b * g)).reshape(b, g)
    old = -torch.arange(float(b * g * (prompt + width))).reshape(b, g, -1)
    common: dict[str, Any] = {
        "max_lengths": torch.full((b,), width + 1),
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "prompts": [f"p{i}" for i in range(b)],
        "responses": [f"r{i}" for i in range(b * g)],
    }
    padded = Rollouts.from_dict(
        {"sequences": sequences, "attention_masks": masks, "prompt_lens": torch.full((b,), prompt)}
        | {"advantages": advantages, "old_logprobs": old, **common}
    )
    rows: dict[str, Any] = {
        "input_ids": [],
        "attention_mask": [],
        "loss_mask": [],
        "group_ids": [],
        "advantages": [],
        "old_logprobs": [],
    }
    for i in range(b):
        for j in range(g):
            rows["input_ids"].append(sequences[i, j].tolist())
            rows["attention_mask"].append(masks[i, j].tolist())
            rows["loss_mask"].append([0] * prompt + masks[i, j].tolist()[prompt:])
            rows["group_ids"].append(i)
            rows["advantages"].append(float(advantages[i, j]))
            rows["old_logprobs"].append(old[i, j].tolist())
    flat = Rollouts(**rows, **common)
    for field in (*rows, "max_lengths"):
        assert torch.equal(getattr(padded, field), getattr(flat, field)), field
    assert (padded.temperature, padded.top_p, padded.top_k, padded.min_p) == (0.7, 0.9, 40, 0.05)
    assert (padded.prompts, padded.responses) == (flat.prompts, flat.responses)


def test_prompt_lens_may_differ_between_prompts() -> None:
    ones = torch.ones(2, 1, 4, dtype=torch.int64)
    batch = {
        "sequences": ones,
        "attention_masks": ones,
        "prompt_lens": torch.tensor([1, 4]),
        "rewards": torch.zeros(2, 1),
    }
    assert Rollouts.from_dict(batch).loss_mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]


def padded_batch(left: list[int], prompts: list[list[int]], width: int, answers: Any = None) -> dict[str, Any]:
    """Two responses to every prompt, [left padding, prompt] of one width and three response tokens."""
    rows = [
        [[0] * pad + prompt + answer for answer in (answers or [[8, 9, 8], [9, 8, 9]])]
        for pad, prompt in zip(left, prompts, strict=True)
    ]
    sequences = torch.tensor(rows)
    columns = torch.arange(sequences.shape[-1])
    masks = (columns >= torch.tensor(left)[:, None, None]).long().expand(sequences.shape).clone()
    advantages = torch.tensor([[1.0, -1.0]] * len(left))
    starts = torch.full((len(left),), width)
    return {"sequences": sequences, "attention_masks": masks, "prompt_lens": starts, "advantages": advantages}


PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3]]


def test_counts_beside_left_padding_are_told_from_columns() -> None:
    batch = padded_batch([0, 1, 2], PROMPTS, 5)
    assert Rollouts.from_dict(batch).response_lengths.tolist() == [3] * 6
    counts = batch | {"prompt_lens": torch.tensor([5, 4, 3])}
    with pytest.raises(
        ValueError, match=r"\[5, 4, 3\], which look like counts[\s\S]*pass \[5, 5, 5\] if they are counts"
    ):
        Rollouts.from_dict(counts)
    # One response to a prompt: no tokens to compare, and the one width that counts lead to is enough.
    alone = {key: value[:, :1] if value.dim() > 1 else value for key, value in counts.items()}
    with pytest.raises(ValueError, match="look like counts"):
        Rollouts.from_dict(alone)


def test_where_all_prompts_are_equally_long_tokens_tell_counts_from_columns() -> None:
    batch = padded_batch([2, 2], [[1, 2, 3], [3, 2, 1]], 5)
    assert Rollouts.from_dict(batch).response_lengths.tolist() == [3] * 4
    with pytest.raises(ValueError, match="look like counts"):
        Rollouts.from_dict(batch | {"prompt_lens": torch.tensor([3, 3])})


def test_columns_that_no_count_could_be_are_taken() -> None:
    """Responses that agree in their first token beside one column of padding, in prompts of different lengths."""
    batch = padded_batch([0, 1], [[1, 2, 3], [1, 2]], 3, answers=[[8, 9, 8], [8, 8, 9]])
    assert Rollouts.from_dict(batch).response_lengths.tolist() == [3] * 4


def test_rows_of_a_prompt_that_are_padded_differently_are_refused() -> None:
    batch = padded_batch([0, 0], [[1, 2, 3], [1, 2, 3]], 3)
    batch["attention_masks"][1, 1, 0] = 0
    with pytest.raises(ValueError, match=r"prompt 1, and before that column its rows have \[2, 3\] tokens"):
        Rollouts.from_dict(batch)


def test_the_padded_form_is_copied_too() -> None:
    batch = padded_batch(left=[0, 2], prompts=[[3, 4, 5], [6]], width=3)
    rollouts = Rollouts.from_dict(batch)
    before = {name: value.clone() for name, value in tensors(rollouts).items()}
    for key in ("sequences", "attention_masks", "advantages"):
        batch[key].zero_()
    assert all(torch.equal(tensors(rollouts)[name], value) for name, value in before.items())
