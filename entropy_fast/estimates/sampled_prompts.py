"""Which prompts of a batch the entropy side is estimated from, where the update's gradient is there already."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from entropy_fast.columns import TokenScores, Wanted
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.split import Split
from entropy_fast.rollouts import Rollouts

__all__ = ["PromptChunks", "in_all_rows", "of_rows", "refuse_other_updates"]

FIRST_CHUNK = 8  # prompts, where how many are needed is not known yet
MARGIN = 1.05  # of prompts over what the error so far asks for


class PromptChunks:
    """Draws prompts without replacement, by a generator of its own with a fixed seed.

    Args:
        rollouts: the batch.
        most: how many are taken at most; None for all.
        relative_error: of the direct part, at which enough are taken; None to take ``most`` at once.
    """

    def __init__(self, rollouts: Rollouts, most: int | None, relative_error: float | None) -> None:
        with_responses = torch.unique(rollouts.prompt_index[(rollouts.response_lengths > 0).cpu()])
        generator = torch.Generator().manual_seed(0)
        order = with_responses[torch.randperm(len(with_responses), generator=generator)]
        self._order = order if most is None else order[:most]
        self._prompt_of_row = rollouts.prompt_index
        self._relative_error = relative_error
        self._taken = 0
        # One prompt alone would have no others to be compared with.
        at_once = relative_error is None or len(self._order) < FIRST_CHUNK + 2
        self._wanted = len(self._order) if at_once else FIRST_CHUNK

    def go_on(self, result: DeltaH1Result | None) -> bool:
        """Whether there is another chunk to take, given what came of those before."""
        left = len(self._order) - self._taken
        if result is None or not left:
            return left > 0
        if self._relative_error is None:
            return False
        assert result.split is not None
        direct = result.split.direct
        aimed = self._relative_error * abs(direct.value)
        if not math.isnan(direct.std_error) and direct.std_error <= aimed:
            return False
        # Errors fall with the root of how many there are; and at least as many again are worth another sweep.
        needed = self._taken * (direct.std_error / aimed) ** 2 * MARGIN if aimed > 0 else math.inf
        self._wanted = left if not needed < len(self._order) else max(2, math.ceil(needed) - self._taken)
        # A single prompt has no others to be compared with.
        if left - self._wanted < 2:
            self._wanted = left
        return True

    def next_rows(self) -> Tensor:
        """Rows of the next chunk's prompts, in the batch's order."""
        chosen = self._order[self._taken : self._taken + self._wanted]
        self._taken += len(chosen)
        return torch.isin(self._prompt_of_row, chosen).nonzero().squeeze(-1)


def of_rows(wanted: Wanted, rows: Tensor, share: float = 1.0) -> Wanted:
    """What is asked for, of some rows of the batch.

    Args:
        wanted: of the whole batch.
        rows: [n] their numbers.
        share: prompts of these rows over prompts of the batch: coefficients of an update are of the whole batch's gradient.
    """
    functionals = {name: torch.as_tensor(numbers)[rows] for name, numbers in wanted.functionals.items()}
    mask = None if wanted.entropy_mask is None else torch.as_tensor(wanted.entropy_mask)[rows]
    update = _of_rows(wanted.update, rows, share)
    candidates = {name: _of_rows(own, rows, share) for name, own in wanted.candidates.items()}
    scores = wanted.scores
    if scores is not None:
        scores = TokenScores(*(torch.as_tensor(table).cpu()[rows] for table in (scores.logprobs, scores.entropies)))
    return dataclasses.replace(
        wanted, functionals=functionals, entropy_mask=mask, update=update, candidates=candidates, scores=scores
    )


def _of_rows(given: Any, rows: Tensor, share: float) -> Any:
    """Coefficients of some rows; what is none as it is."""
    if isinstance(given, tuple):
        return tuple(torch.as_tensor(own)[rows] / share for own in given)
    return given[rows] / share if isinstance(given, Tensor) else given


def in_all_rows(result: DeltaH1Result, rollouts: Rollouts, rows: Tensor) -> DeltaH1Result:
    """With shares of tokens in the rows of the whole batch; NaN at response tokens of prompts that were not sampled.

    Args:
        result: of some rows.
        rollouts: the batch.
        rows: [n] their numbers.
    """
    if result.by_token is None:
        return result

    def spread(forecast: Forecast) -> Forecast:
        if forecast.by_token is None:
            return forecast
        table = torch.where(rollouts.loss_mask.cpu() == 1, math.nan, 0.0).double()
        table[rows] = forecast.by_token
        return dataclasses.replace(forecast, by_token=table)

    split = result.split
    if split is not None:
        split = Split(spread(split.total), spread(split.direct), spread(split.visitation), split.on_batch)
    functionals = {name: spread(own) for name, own in result.functionals.items()}
    return dataclasses.replace(result, forecast=spread(result.forecast), split=split, functionals=functionals)


def refuse_other_updates(wanted: Wanted, estimate: EstimateOptions, run: RunOptions) -> None:
    """Raise where something is asked for that a live gradient does not go with.

    Raises:
        ConfigError: it is.
    """
    if callable(wanted.update) and not isinstance(wanted.update, Tensor):
        raise ConfigError(
            "`update` with gradient='live', whose update is what stands in .grad.",
            fix="leave it out, or take gradient='rollouts'; coefficients that say how .grad weighs tokens can be given.",
        )
    if wanted.candidates and wanted.update is None:
        raise ConfigError(
            "`updates` with gradient='live' and without `coefficients`: nothing says what of .grad they change.",
            fix="pass coefficients, -∂L/∂(log-prob) (and -∂L/∂(entropy)) of the loss that .grad is of.",
        )
    if estimate.relative_error is not None and (wanted.candidates or run.by_token):
        raise ConfigError(
            "`updates` or by_token with relative_error, which goes on in chunks of prompts; both are of one sample.",
            fix="pass sample instead of relative_error.",
        )
    if run.by_sequence:
        raise ConfigError(
            "by_sequence with gradient='live', which may take a sample of the prompts.", fix="take gradient='rollouts'."
        )
