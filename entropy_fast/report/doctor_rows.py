"""A few short rows of a batch, enough to try a model on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from entropy_fast.rollouts import Rollouts

__all__ = ["few_short_rows", "prompts_with_advantage", "synthetic_rollouts"]

PROMPTS = 2
PROMPT_TOKENS = 32
RESPONSE_TOKENS = 32


def prompts_with_advantage(rollouts: Rollouts) -> list[int]:
    """Indices of the prompts that have any response with an advantage other than 0: those that the update is made of."""
    assert rollouts.advantages is not None
    return [n for n in range(rollouts.n_prompts) if bool((rollouts.advantages[rollouts.rows_of_prompt(n)] != 0).any())]


def few_short_rows(rollouts: Rollouts) -> Rollouts:
    """Two prompts with two responses each, cut to a few dozen tokens around where the response starts.

    Prompts with an advantage come first, then those whose two responses are still told apart after the cut, then short ones;
    of a prompt's responses, those with the largest and the smallest advantage.

    Args:
        rollouts: without empty responses, at least two to a prompt.
    """
    assert rollouts.advantages is not None
    useful = set(prompts_with_advantage(rollouts))
    candidates = []
    for n in range(rollouts.n_prompts):
        rows = rollouts.rows_of_prompt(n)
        order = rollouts.advantages[rows].argsort(stable=True)
        pair = rows[order[[0, -1]].cpu()] if len(rows) > 1 else rows
        short = _shortened(rollouts.select_rows(pair))
        told_apart = len(torch.unique(short.input_ids * short.attention_mask, dim=0)) == len(pair)
        candidates.append((n not in useful, not told_apart, int(short.attention_mask.sum()), n, pair))
    chosen = sorted(candidates, key=lambda c: c[:4])[:PROMPTS]
    return _shortened(rollouts.select_rows(torch.cat([pair for *_, pair in chosen])))


def _shortened(rollouts: Rollouts) -> Rollouts:
    """The tokens around each row's first response token, without padding in front."""
    columns: list[Tensor] = []
    for attention, loss in zip(rollouts.attention_mask.cpu(), rollouts.loss_mask.cpu(), strict=True):
        real = attention.nonzero().squeeze(-1)
        first = int((loss[real] == 1).nonzero()[0])
        columns.append(real[max(0, first - PROMPT_TOKENS) : first + RESPONSE_TOKENS])
    width = max(len(part) for part in columns)

    def gather(tensor: Tensor) -> Tensor:
        cut = tensor.new_zeros((len(columns), width))
        for row, part in enumerate(columns):
            cut[row, : len(part)] = tensor[row, part.to(tensor.device)]
        return cut

    def optional(table: Tensor | None) -> Tensor | None:
        return None if table is None else gather(table)

    return dataclasses.replace(
        rollouts,
        input_ids=gather(rollouts.input_ids),
        attention_mask=gather(rollouts.attention_mask),
        loss_mask=gather(rollouts.loss_mask),
        old_logprobs=optional(rollouts.old_logprobs),
        ref_logprobs=optional(rollouts.ref_logprobs),
        token_weights=optional(rollouts.token_weights),
    )


def synthetic_rollouts(
    vocabulary: int, prompts: int = PROMPTS, responses: int = 2, length: int = 8, seed: int = 0
) -> Rollouts:
    """Random tokens in the shape of rollouts, for checks that need no meaning."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(vocabulary, (prompts, 1, length), generator=generator).expand(-1, responses, -1)
    ids = torch.cat([shared, torch.randint(vocabulary, (prompts, responses, length), generator=generator)], -1)
    rewards = torch.arange(prompts * responses).reshape(prompts, responses).remainder(2)
    return Rollouts.from_dict(
        {
            "sequences": ids,
            "attention_masks": torch.ones_like(ids),
            "prompt_lens": torch.full((prompts,), length),
            "rewards": rewards.to(torch.float64),
            "max_lengths": torch.full((prompts,), length),
        }
    )
