"""Random rollouts with everything a batch may have: padding on both sides, ragged groups in any order, holes, no response."""

from __future__ import annotations

import dataclasses
import random

import torch

from entropy_fast.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a batch looks like.

    Attributes:
        sizes: responses of each prompt.
        longest_prompt, longest_response: tokens; lengths are drawn from 1 to there.
        interleaved: rows of different prompts in random order.
        holes: columns inside prompt and response that are not attended to, and unscored tokens inside the response.
        empty: rows without response tokens that are added to the first prompt.
        budget: 0 no `max_lengths`; otherwise longest response + this, different for every prompt.
    """

    sizes: tuple[int, ...] = (3, 2, 4, 3, 2)
    longest_prompt: int = 5
    longest_response: int = 6
    interleaved: bool = True
    holes: bool = False
    empty: int = 0
    budget: int = 0


def make_rollouts(shape: Shape, vocabulary: int, seed: int = 0) -> Rollouts:
    """Left-padded prompts, right-padded responses, junk tokens under every padding."""
    rng = random.Random(seed)
    width_prompt, width_response = shape.longest_prompt + 2, shape.longest_response + 2
    rows = []
    for group, size in enumerate(shape.sizes):
        prompt_length = rng.randint(1, shape.longest_prompt)
        prompt = [rng.randrange(vocabulary) for _ in range(prompt_length)]
        left = [rng.randrange(vocabulary) for _ in range(width_prompt - prompt_length)]
        prompt_mask = [0] * (width_prompt - prompt_length) + [1] * prompt_length
        if shape.holes and prompt_length > 2:
            prompt_mask[-2] = 0
        for answer in range(size + (shape.empty if group == 0 else 0)):
            length = rng.randint(1, shape.longest_response) if answer < size else 0
            ids = left + prompt + [rng.randrange(vocabulary) for _ in range(width_response)]
            attention = prompt_mask + [1] * length + [0] * (width_response - length)
            loss = [0] * width_prompt + [1] * length + [0] * (width_response - length)
            if shape.holes and length > 2:
                hole = width_prompt + rng.randrange(1, length - 1)
                attention[hole] = loss[hole] = 0
                loss[hole + 1] = rng.randrange(2)  # seen, but scored in some rows only (a tool's answer, say)
            rows.append((10 + group, ids, attention, loss, rng.gauss(0, 1)))
    if shape.interleaved:
        rng.shuffle(rows)
    groups, ids, attention, loss, rewards = zip(*rows, strict=True)
    count = len(shape.sizes)
    # Budgets go by prompts in order of first appearance.
    budgets = (
        torch.tensor([shape.longest_response + shape.budget + 3 * n for n in range(count)]) if shape.budget else None
    )
    return Rollouts(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(attention),
        loss_mask=torch.tensor(loss),
        group_ids=torch.tensor(groups),
        advantages=torch.tensor(rewards, dtype=torch.float64),
        max_lengths=budgets,
        temperature=1.0,
        top_p=1.0,
    )
