"""Rollouts with everything that goes wrong in practice: left padding, ragged groups, responses of different lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from entropy_fast import Rollouts
from probe_models.architectures import VOCABULARY

PAD = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence as a sampler would give it, without padding."""

    group: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    advantage: float


def make_samples(group_sizes: Sequence[int] = (2, 3, 2), *, seed: int = 5, interleave: bool = True) -> list[Sample]:
    """Samples of ``len(group_sizes)`` prompts of different lengths; groups take turns when interleaved."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist())

    samples = []
    for index, size in enumerate(group_sizes):
        prompt = draw(2 + (3 * index) % 5)
        for _ in range(size):
            length = int(torch.randint(2, 7, (), generator=generator))
            samples.append(Sample(10 + index, prompt, draw(length), float(torch.randn((), generator=generator))))
    if interleave:
        order = torch.randperm(len(samples), generator=generator).tolist()
        samples = [samples[k] for k in order]
    return samples


def pack(samples: Sequence[Sample], **fields: Any) -> Rollouts:
    """Rollouts: prompts padded on the left, responses on the right, budget 8 and sampling (1, 1) unless given."""
    left = max(len(s.prompt) for s in samples)
    right = max(len(s.response) for s in samples)
    ids, attention, loss = [], [], []
    for s in samples:
        before, after = left - len(s.prompt), right - len(s.response)
        ids.append([PAD] * before + [*s.prompt, *s.response] + [PAD] * after)
        attention.append([0] * before + [1] * (len(s.prompt) + len(s.response)) + [0] * after)
        loss.append([0] * left + [1] * len(s.response) + [0] * after)
    known: dict[str, Any] = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attention),
        "loss_mask": torch.tensor(loss),
        "group_ids": torch.tensor([s.group for s in samples]),
        "advantages": torch.tensor([s.advantage for s in samples]),
        "max_lengths": 8,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    return Rollouts(**(known | fields))


def make_rollouts(group_sizes: Sequence[int] = (2, 3, 2), *, seed: int = 5, **fields: Any) -> Rollouts:
    """`pack(make_samples(...))`."""
    return pack(make_samples(group_sizes, seed=seed), **fields)
