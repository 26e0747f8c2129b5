"""Which prompts of a batch the entropy side is estimated from, where the update's gradient is there already."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from entropy_fast.columns import Wanted
from entropy_fast.config import RunOptions
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.rollouts import Rollouts

__all__ = ["PromptChunks", "of_rows", "refuse_other_updates"]

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
        rows: which.
        share: their prompts of all prompts of the batch. Coefficients are of the whole batch's loss, and would be taken for
            those of these prompts' alone.
    """
    functionals = {name: torch.as_tensor(numbers)[rows] for name, numbers in wanted.functionals.items()}
    mask = None if wanted.entropy_mask is None else torch.as_tensor(wanted.entropy_mask)[rows]
    update = wanted.update
    if update is not None and (isinstance(update, Tensor) or not callable(update)):
        given = update if isinstance(update, tuple) else (update,)
        own = [torch.as_tensor(table)[rows].double() / share for table in given]
        update = own[0] if len(own) == 1 else (own[0], own[1])
    return dataclasses.replace(wanted, functionals=functionals, entropy_mask=mask, update=update, scores=None)


def refuse_other_updates(wanted: Wanted, run: RunOptions) -> None:
    """Raise where something is asked for that a live gradient does not go with.

    Raises:
        ConfigError: it is.
    """
    loss = callable(wanted.update) and not isinstance(wanted.update, Tensor)
    for name, given in (("update", loss), ("updates", bool(wanted.candidates))):
        if given:
            raise ConfigError(
                f"`{name}` with gradient='live', whose update is what stands in .grad.",
                fix="leave it out (coefficients may say what every token's part in .grad is), or take gradient='rollouts'.",
            )
    if run.by_sequence or run.by_token:
        raise ConfigError(
            "by_sequence and by_token with gradient='live', which may take a sample of the prompts.",
            fix="take gradient='rollouts'.",
        )
