"""Candidates as coefficients of every token of a batch: what is to be compared with a gradient that is there already.

Only a sample of the prompts may be gone through then, and what a candidate does may depend on all of them (a share of the
batch's tokens, a mean over them, a loss that couples rows). So it is worked out before the sample is taken, from scores of
the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_fast.columns.candidates import Candidate, candidate_column
from entropy_fast.columns.given import GivenUpdate, LossFunction, given_update
from entropy_fast.columns.scores import ResolvedColumn, TokenScores
from entropy_fast.config import EstimateOptions
from entropy_fast.errors import ConfigError
from entropy_fast.rollouts import Rollouts

__all__ = ["GivenCandidate", "GivenCoefficients", "candidate_tables", "needs_scores"]

GivenCoefficients = Tensor | tuple[Tensor, Tensor]
GivenCandidate = Candidate | LossFunction | GivenCoefficients


def needs_scores(candidates: Mapping[str, GivenCandidate]) -> bool:
    """Whether one of them depends on what the policy says of the batch."""
    return any(not isinstance(own, (Tensor, tuple)) for own in candidates.values())


def candidate_tables(
    candidates: Mapping[str, GivenCandidate],
    planned: GivenCoefficients,
    scores: TokenScores | None,
    rollouts: Rollouts,
    options: EstimateOptions,
    clip: float = 1.0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """[N, T] -∂L/∂(log-prob) and -∂L/∂(entropy) of every candidate, 0 where no response token stands.

    Args:
        candidates: by name.
        planned: coefficients of the update that they change, of all rows, as the gradient stands.
        scores: of all rows; None where no candidate needs them.
        rollouts: the batch as it was given, empty responses included.
        options: of the estimate.
        clip: what clipping multiplied that gradient by. A candidate changes the loss, and is clipped by the same factor.

    Raises:
        ConfigError: a candidate is none, or changes options where the update is given.
        RolloutsError: the rollouts lack what it needs.
    """
    mask = rollouts.loss_mask.cpu() == 1
    kept = rollouts.response_lengths > 0
    parts = planned if isinstance(planned, tuple) else (planned,)
    unclipped = tuple(torch.as_tensor(part) / clip for part in parts)
    own = given_update(unclipped if len(unclipped) == 2 else unclipped[0], rollouts)
    batch = rollouts.for_autograd().without_empty_responses()[0]
    known = None if scores is None else scores.of_rows(rollouts)
    found = {}
    for name, candidate in candidates.items():
        column = candidate_column(candidate, own, options, rollouts, name)
        if isinstance(column, ResolvedColumn):
            if known is None:
                raise ConfigError(f"updates: {name!r} depends on scores of the batch.", fix="pass `scores`.")
            column = column.resolved(known, batch)
        assert isinstance(column, GivenUpdate)
        tables = []
        for values in (column.of_logprob, column.of_entropy):
            table = torch.zeros(mask.shape, dtype=torch.float64)
            if values is not None:
                table[kept] = (values[:, None] if values.dim() == 1 else values) * mask[kept]
            tables.append(table * clip)
        found[name] = tables[0], tables[1]
    return found
