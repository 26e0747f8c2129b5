"""Rollouts in the padded form that trainers keep: prompts on the left of a column, responses on the right of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from entropy_fast import Rollouts


@dataclasses.dataclass(frozen=True)
class Padded:
    """B prompts with G responses each, prompts padded on the left to P columns, responses on the right to R.

    Attributes:
        ids: [B, G, P + R].
        attention: [B, G, P + R], 1 at tokens.
        positions: [B, G, P + R], the number of tokens before each; 0 on padding in front.
        scored: [B, G, R] fp32, 1 at response tokens.
        advantages: [B, G] fp32.
        budgets: [B] fp32, L_max.
    """

    ids: Tensor
    attention: Tensor
    positions: Tensor
    scored: Tensor
    advantages: Tensor
    budgets: Tensor

    @property
    def prompts(self) -> int:
        return self.ids.shape[0]

    @property
    def prompt_width(self) -> int:
        return self.ids.shape[-1] - self.scored.shape[-1]

    def part(self, start: int, stop: int) -> Padded:
        """Prompts ``start`` to ``stop``, not included."""
        fields = {f.name: getattr(self, f.name)[start:stop] for f in dataclasses.fields(self)}
        return Padded(**fields)

    def microbatches(self, prompts: int) -> list[Padded]:
        return [self.part(start, start + prompts) for start in range(0, self.prompts, prompts)]

    def coefficients(self, sequence_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy and update coefficients c and a [B, G] (docs/theory.md), detached, from S [B, G]."""
        weighted = sequence_logprobs.detach() / self.budgets[:, None]
        responses = weighted.shape[1]
        others = (weighted.sum(1, keepdim=True) - weighted) / (responses - 1)
        return (others - weighted) / responses, self.advantages / self.budgets[:, None] / responses


def padded_of(rollouts: Rollouts) -> Padded:
    """The padded form of rollouts whose prompts all have the same number of responses."""
    rows = torch.stack([rollouts.rows_of_prompt(n) for n in range(rollouts.n_prompts)])
    total, response = rollouts.attention_mask.sum(-1), rollouts.loss_mask.sum(-1)
    P, R = int((total - response).max()), int(response.max())
    ids = torch.zeros(rollouts.n_sequences, P + R, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row in range(rollouts.n_sequences):
        tokens = rollouts.input_ids[row][rollouts.attention_mask[row] == 1]
        start = P - (len(tokens) - int(response[row]))
        ids[row, start : start + len(tokens)] = tokens
        attention[row, start : start + len(tokens)] = 1
    assert rollouts.advantages is not None
    return Padded(
        ids=ids[rows],
        attention=attention[rows],
        positions=(attention.cumsum(-1) - 1).clamp(min=0)[rows],
        scored=attention[rows][..., P:].float(),
        advantages=rollouts.advantages.float()[rows],
        budgets=rollouts.length_budgets.float(),
    )
