"""How a batch is cut: microbatches bound memory, units are what the U-statistic counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.rollouts import Rollouts

__all__ = ["iter_microbatches", "prompt_units"]


def prompt_units(n_prompts: int, blocks: int | None) -> list[list[int]]:
    """Prompt indices of every unit: one prompt each, or ``blocks`` contiguous blocks whose sizes differ by at most one.

    Raises:
        ConfigError: more blocks than prompts.
    """
    if blocks is None:
        return [[n] for n in range(n_prompts)]
    if blocks > n_prompts:
        raise ConfigError(f"blocks={blocks} for {n_prompts} prompts.", fix="use at most one block per prompt.")
    return [part.tolist() for part in torch.arange(n_prompts).tensor_split(blocks)]


def iter_microbatches(rollouts: Rollouts, prompts: list[int], size: int) -> Iterator[Tensor]:
    """Row indices [n] of successive microbatches of at most ``size`` whole prompts."""
    for start in range(0, len(prompts), size):
        yield torch.cat([rollouts.rows_of_prompt(n) for n in prompts[start : start + size]])
