"""Finding out what a step did: what is kept before it, and how the policy after it is looked at.

Never on the samples that made the step: scored again, they agree with any forecast that was made from them, right or wrong.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Protocol

import torch
from torch import Tensor, nn

from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.distributed.agreement import fingerprint, refuse_others
from entropy_fast.distributed.rows import gather_rows
from entropy_fast.distributed.team import Team
from entropy_fast.errors import EntropyFastWarning
from entropy_fast.integrations.forecast_options import ForecastOptions, HeldOut, SharedHeldOut
from entropy_fast.integrations.looking_back import KeptPolicy, Realised, ScoredResponses
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.rollouts import Rollouts
from entropy_fast.sharded.fsdp2 import ShardedModel, fsdp2_modules

__all__ = ["Verification", "verification_of"]

FEWEST = 2  # prompts

Found = tuple[Realised | None, str]  # what the step did; or None, and why that is not known


class Verification(Protocol):
    """What is kept of the policy before a step."""

    @property
    def needs_window(self) -> bool:
        """Whether it looks at the next step's window."""

    def found(self, optimizer: torch.optim.Optimizer, window: StepWindow | None, team: Team) -> Found:
        """What the step did, once it was taken.

        Args:
            optimizer: of the model.
            window: of the next step; None where it is not there.
            team: the ranks that find it out together.
        """


def verification_of(
    options: ForecastOptions,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: StepWindow,
    prompts: int,
    estimate: EstimateOptions,
    run: RunOptions,
    team: Team,
) -> Verification | None:
    """Keep what is needed, before the step; None where nothing is to be found out.

    Args:
        options: of forecasts.
        model: as it is now.
        optimizer: of it.
        window: of the step.
        prompts: that the forecast was made from.
        estimate: of the forecast.
        run: likewise.
        team: the ranks that do so together.

    Raises:
        DistributedError: a rank failed, or was given other responses than the first.
        RolloutsError, ModelStateError, OptimizerStateError, ConfigError: see `fast_delta_h1`.
        Whatever ``options.held_out`` raises.
    """
    if options.verify is None:
        return None
    rounded = _rounded_to(model)
    if rounded is not None:
        return _Nothing(f"FSDP2 rounds parameters to {rounded} in every forward, which hides what a step does")
    if options.verify == "previous":
        return _NextWindow(KeptPolicy(model), max(FEWEST, prompts), estimate, run)
    assert options.held_out is not None
    responses = _held_out(options.held_out, window, max(FEWEST, prompts), team)
    rows = _rows_with_others(responses, responses.response_lengths > 0)
    if rows is None:
        return _Nothing("too few prompts that were held out have two responses or more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)
        kept = ScoredResponses(model, optimizer, _selected(responses, rows), estimate=estimate, run=run, team=team)
    return _HeldOut(kept, estimate)


def _rounded_to(model: nn.Module) -> torch.dtype | None:
    """What FSDP2 rounds trained parameters to before anything is computed; None where it does not, or shards nothing.

    Autocast is left out of forwards that measure what a step did. FSDP2's casts are not, since what they round has no other
    form that forwards see.
    """
    modules = fsdp2_modules(model)
    if not modules:
        return None
    trained = [own for own in ShardedModel.of(model, modules).parameters if own.tensor.requires_grad]
    return next((own.computed_in for own in trained if own.computed_in.itemsize < own.tensor.dtype.itemsize), None)


def _held_out(source: HeldOut, window: StepWindow, prompts: int, team: Team) -> Rollouts:
    """Responses that are held out, the same on all ranks; made by all of them where they can be shared out."""
    if team.size > 1 and isinstance(source, SharedHeldOut):
        return gather_rows(source.share(window, prompts, team.rank, team.size), team=team).rollouts
    found = source(window, prompts)
    refuse_others(
        team,
        {"responses that are held out": fingerprint(found)},
        fix="have held_out return the same responses on all ranks.",
    )
    return found


@dataclasses.dataclass(frozen=True)
class _Nothing:
    """Nothing is known, and why."""

    reason: str
    needs_window = False

    def found(self, optimizer: torch.optim.Optimizer, window: StepWindow | None, team: Team) -> Found:
        """See `Verification`."""
        return None, self.reason


@dataclasses.dataclass(frozen=True)
class _NextWindow:
    """The policy before the step, for responses of the window after it."""

    policy: KeptPolicy
    prompts: int
    estimate: EstimateOptions
    run: RunOptions
    needs_window = True

    def found(self, optimizer: torch.optim.Optimizer, window: StepWindow | None, team: Team) -> Found:
        """See `Verification`."""
        if window is None:
            return None, "the next step's batch is not there"
        if window.on_policy is None:
            return None, "nothing says whether the responses were sampled after the step"
        rows = _rows_with_others(
            window.rollouts, window.on_policy.cpu() & (window.rollouts.response_lengths > 0), self.prompts
        )
        if rows is None:
            return None, "too few prompts have two responses or more that were sampled after the step"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EntropyFastWarning)
            done = self.policy.change_since(
                optimizer, _selected(window.rollouts, rows), estimate=self.estimate, run=self.run, team=team
            )
        return _of_parts(done, self.estimate), ""


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Responses of the policy before the step, scored by it."""

    responses: ScoredResponses
    estimate: EstimateOptions
    needs_window = False

    def found(self, optimizer: torch.optim.Optimizer, window: StepWindow | None, team: Team) -> Found:
        """See `Verification`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EntropyFastWarning)
            return _of_parts(self.responses.change(optimizer, team), self.estimate), ""


def _of_parts(done: Realised, estimate: EstimateOptions) -> Realised:
    if estimate.wanted_parts == ("direct",):
        # Responses of a truncated policy are weighed by what they were not drawn from.
        return dataclasses.replace(done, total=math.nan, total_error=math.nan)
    return done


def _rows_with_others(rollouts: Rollouts, usable: Tensor, most: int | None = None) -> Tensor | None:
    """Rows of the first prompts all of whose responses are usable, with two or more each; None where prompts are too few."""
    chosen = []
    for prompt in range(rollouts.n_prompts):
        rows = rollouts.rows_of_prompt(prompt)
        rows = rows[rollouts.response_lengths[rows] > 0]
        # One response alone has no others of its prompt to be weighed against.
        if len(rows) > 1 and bool(usable[rows].all()):
            chosen.append(rows)
    return torch.cat(chosen[:most]) if len(chosen) >= FEWEST else None


def _selected(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    return rollouts if len(rows) == rollouts.n_sequences else rollouts.select_rows(rows)
