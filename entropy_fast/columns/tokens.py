"""Response tokens of some sequences as a table, and which sequences share a prompt."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from entropy_fast.rollouts import Rollouts

__all__ = ["TokenPlaces"]


@dataclasses.dataclass(frozen=True)
class TokenPlaces:
    """Where the M response tokens of n sequences stand in a table [n, longest]; on the CPU.

    There a sum along a row has one order; a running sum on CUDA need not.

    Attributes:
        sequence, column: [M].
        prompt: [n] the prompts, counted from 0 within these sequences.
        longest: columns of the table.
    """

    sequence: Tensor
    column: Tensor
    prompt: Tensor
    longest: int

    @classmethod
    def of(cls, rollouts: Rollouts, rows: Tensor) -> TokenPlaces:
        """Of the given rows of a batch."""
        lengths = rollouts.response_lengths[rows]
        column = torch.cat([torch.arange(length) for length in lengths.tolist()])
        sequence = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        _, prompt = torch.unique(rollouts.prompt_index[rows], return_inverse=True)
        return cls(sequence, column, prompt, int(lengths.max()))

    @cached_property
    def member(self) -> Tensor:
        """[n, prompts] 1 where a sequence answers a prompt, fp64: one matrix product forms all sums by prompt, in one order."""
        return torch.nn.functional.one_hot(self.prompt).to(torch.float64)

    @cached_property
    def group_size(self) -> Tensor:
        """[n] G of every sequence's prompt, fp64."""
        return self.member @ self.member.sum(0)

    def table(self, values: Tensor) -> Tensor:
        """[n, longest] of values [M]; 0 elsewhere."""
        table = values.new_zeros(len(self.prompt), self.longest)
        table[self.sequence, self.column] = values
        return table

    def means(self, values: Tensor) -> Tensor:
        """[n] of values [M], over the tokens of each sequence."""
        return self.table(values).sum(1) / self.table(torch.ones_like(values)).sum(1)
