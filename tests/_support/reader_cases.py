"""Ragged sequences that tests lay out as other trainers do, and what a reader must make of them.

Every number by token is another one, so that a shift by a column, or by a row, is seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from entropy_fast import Rollouts


@dataclasses.dataclass(frozen=True)
class Case:
    """N sequences: tokens, masks [R] of the response, group ids."""

    prompts: list[list[int]]
    responses: list[list[int]]
    masks: list[list[int]]
    groups: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    def numbers(self, scale: float) -> list[list[float]]:
        """By sequence, a number for every response token, of a sign and a size that ``scale`` says."""
        return [[scale * (1 + 10 * row + at) for at in range(len(r))] for row, r in enumerate(self.responses)]

    def by_sequence(self, scale: float) -> list[float]:
        return [scale * (1 + row) * (-1) ** row for row in range(len(self))]

    def uids(self) -> list[str]:
        return [f"prompt-{group}" for group in self.groups]


OLD, REF, ADVANTAGE, WEIGHT = -0.01, -0.02, 0.5, 0.25

# Two rows of one prompt and one of another, interleaved; lengths differ; a token in the middle that a tool wrote.
PLAIN = Case(
    prompts=[[5, 6, 7], [8], [5, 6, 7]],
    responses=[[11, 12], [13, 14, 15, 16], [17, 18, 19]],
    masks=[[1, 1], [1, 0, 1, 1], [1, 1, 1]],
    groups=[4, 9, 4],
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to four sequences; a mask is all zeros, or begins with a one (a prompt ends where the first response begins)."""
    tokens = st.integers(2, 30)  # 0 and 1 are left to padding
    of_group = draw(st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=3))
    count = draw(st.integers(1, 4))
    groups = draw(st.lists(st.integers(0, len(of_group) - 1), min_size=count, max_size=count))
    responses = draw(st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=count, max_size=count))
    masks = []
    for response in responses:
        tail = draw(st.lists(st.integers(0, 1), min_size=len(response) - 1, max_size=len(response) - 1))
        masks.append([1, *tail] if draw(st.booleans()) else [0] * len(response))
    return Case([of_group[group] for group in groups], responses, masks, groups)


def padded(rows: list[list[Any]], width: int, side: str, value: float = 0) -> torch.Tensor:
    """[N, width] rows padded on one side."""
    filled = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, filled, strict=True)])


def assert_same(
    rollouts: Rollouts,
    case: Case,
    *,
    old: list[list[float]] | None = None,
    ref: list[list[float]] | None = None,
    advantages: list[list[float]] | list[float] | None = None,
    weights: list[list[float]] | None = None,
) -> None:
    """Token for token: ids, loss mask and every number in the column of its token, and nothing beside.

    Advantages and weights by token are compared as what they are multiplied to.
    """
    assert rollouts.n_sequences == len(case)
    same = [(a == b) for a in rollouts.group_ids.tolist() for b in rollouts.group_ids.tolist()]
    assert same == [(a == b) for a in case.groups for b in case.groups]
    for name, given in (("old_logprobs", old), ("ref_logprobs", ref)):
        assert (getattr(rollouts, name) is None) == (given is None), name
    factors = torch.ones(rollouts.input_ids.shape) if rollouts.token_weights is None else rollouts.token_weights
    assert rollouts.advantages is not None
    products = rollouts.advantages.unsqueeze(-1) * factors
    for row in range(len(case)):
        kept = rollouts.attention_mask[row] == 1
        before = len(case.prompts[row])
        mask = torch.tensor([0] * before + case.masks[row]) == 1
        assert rollouts.input_ids[row][kept].tolist() == case.prompts[row] + case.responses[row]
        assert (rollouts.loss_mask[row][kept] == 1).tolist() == mask.tolist()
        for found, expected in ((rollouts.old_logprobs, old), (rollouts.ref_logprobs, ref)):
            if found is not None and expected is not None:
                wanted = torch.tensor([0.0] * before + expected[row], dtype=torch.float64) * mask
                torch.testing.assert_close(found[row][kept].double(), wanted, rtol=1e-6, atol=0)
        if advantages is not None:
            given = advantages[row]
            by_token = given if isinstance(given, list) else [given] * len(case.responses[row])
            scale = weights[row] if weights is not None else [1.0] * len(by_token)
            wanted = torch.tensor([a * w for a, w in zip(by_token, scale, strict=True)], dtype=torch.float64)
            torch.testing.assert_close(products[row][kept][before:][mask[before:]].double(), wanted[mask[before:]])
