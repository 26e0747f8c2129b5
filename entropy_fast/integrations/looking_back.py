"""What a step did, from responses that had no part in it.

Legend: θ the policy before the step, θ' after it, y responses.

Responses that know nothing of the samples that made the step or its forecast, scored under both policies, say by importance
weights what changed: sampled from θ, by π_θ'(y)/π_θ(y), how the entropy changes from there to θ'; sampled from θ', as those
of the next window are, by the inverse, how it changes back, and with the other sign what the step did. Prompts are those of
the responses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.columns import TokenScores
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.distributed.team import Team
from entropy_fast.rollouts import Rollouts
from entropy_fast.sharded.fsdp2 import fsdp2_modules, is_sharded
from entropy_fast.truth import Scored, scored

__all__ = ["KeptPolicy", "Realised", "ScoredResponses", "scores_of", "trainable_parameters"]


@dataclasses.dataclass(frozen=True)
class Realised:
    """What a step did, in the unit of its forecast.

    Attributes:
        total: change of the expected entropy; total_error: its standard error, from the sampled prompts.
        direct: at the prefixes that were visited; direct_error: likewise.
        ess: share of the responses that are worth something after weighting.
        pareto_k: of the weights' tail; above 0.7 ``total`` is not to be trusted.
        prompts: how many they are from.
    """

    total: float
    total_error: float
    direct: float
    direct_error: float
    ess: float
    pareto_k: float
    prompts: int


def trainable_parameters(model: nn.Module) -> list[Tensor]:
    """Parameters that a step may move; of those that FSDP2 shards what this rank has, which shares their memory."""
    for module in fsdp2_modules(model).values():
        module.reshard()  # a forward may have left whole ones in their place, which no step moves
    found: list[Any] = [p for p in unwrap_model(model).parameters() if p.requires_grad]
    return [p.detach().to_local() if is_sharded(p) else p for p in found]


class KeptPolicy:
    """A policy as it was, to be looked at once it has moved on.

    Args:
        model: as it is now; its trainable parameters are copied to the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = _copied(trainable_parameters(model))

    def change_since(
        self,
        optimizer: torch.optim.Optimizer,
        responses: Rollouts,
        *,
        estimate: EstimateOptions,
        run: RunOptions,
        team: Team | None = None,
    ) -> Realised:
        """How the expected entropy has changed from the policy that was kept to the one that the model is now.

        Parameters come back bit by bit, also after an exception.

        Args:
            optimizer: of the model.
            responses: sampled from the policy as it is now.
            estimate: of the forecast.
            run: likewise.
            team: the ranks of the same call, that share the work; None for this process by itself.

        Raises:
            RolloutsError, ModelStateError, OptimizerStateError, ConfigError: see `fast_delta_h1`.
        """
        now, then = self._both(optimizer, responses, estimate, run, team)
        back = _realised(now, now.scores, then)
        return dataclasses.replace(back, total=-back.total, direct=-back.direct)

    def change_by_step(
        self, optimizer: torch.optim.Optimizer, responses: Rollouts, *, estimate: EstimateOptions, run: RunOptions
    ) -> Realised:
        """The same from responses that were sampled from the policy that was kept; see `change_since`."""
        now, then = self._both(optimizer, responses, estimate, run)
        return _realised(now, then, now.scores)

    def _both(
        self,
        optimizer: torch.optim.Optimizer,
        responses: Rollouts,
        estimate: EstimateOptions,
        run: RunOptions,
        team: Team | None = None,
    ) -> tuple[Scored, TokenScores]:
        """Responses under the policy as it is now, and under the one that was kept."""
        parameters = trainable_parameters(self._model)

        def score() -> Scored:
            return scored(self._model, optimizer, responses, estimate=estimate, run=run, team=team)

        with _without_mixed_precision(self._model):
            now, here = score(), _copied(parameters)
            try:
                _put(parameters, self._kept)
                then = score().scores
            finally:
                _put(parameters, here)
        return now, then


class ScoredResponses:
    """Responses of a policy as it was, and what it said of them, to be scored again once it has moved on.

    Args:
        model: as it is now.
        optimizer: of the model.
        responses: sampled from the policy as it is now.
        estimate: of the forecast.
        run: likewise.
        team: the ranks of the same call, that share the work; None for this process by itself.

    Raises:
        RolloutsError, ModelStateError, OptimizerStateError, ConfigError: see `fast_delta_h1`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        responses: Rollouts,
        *,
        estimate: EstimateOptions,
        run: RunOptions,
        team: Team | None = None,
    ) -> None:
        self._model, self._responses, self._estimate, self._run = model, responses, estimate, run
        self._then = self._scored(optimizer, team).scores

    def change(self, optimizer: torch.optim.Optimizer, team: Team | None = None) -> Realised:
        """How the expected entropy has changed since.

        Args:
            optimizer: of the model.
            team: see the class.

        Raises:
            RolloutsError, ModelStateError, OptimizerStateError, ConfigError: see `fast_delta_h1`.
        """
        now = self._scored(optimizer, team)
        return _realised(now, self._then, now.scores)

    def _scored(self, optimizer: torch.optim.Optimizer, team: Team | None) -> Scored:
        with _without_mixed_precision(self._model):
            return scored(self._model, optimizer, self._responses, estimate=self._estimate, run=self._run, team=team)


def scores_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    *,
    estimate: EstimateOptions,
    run: RunOptions,
    team: Team | None = None,
) -> TokenScores:
    """What a model says of every response token of a batch, [N, T]; arguments and errors as of `ScoredResponses`."""
    with _without_mixed_precision(model):
        return scored(model, optimizer, rollouts, estimate=estimate, run=run, team=team).scores.spread(rollouts)


def _realised(of: Scored, before: TokenScores, after: TokenScores) -> Realised:
    """The change between two policies, from responses of the first."""
    found = dataclasses.replace(of, scores=before).change_to(after)
    return Realised(
        found.total, found.total_std_error, found.direct, found.direct_std_error, found.ess, found.pareto_k,
        of.rollouts.n_prompts,
    )  # fmt: skip


def _copied(parameters: Sequence[Tensor]) -> list[Tensor]:
    """On the CPU: a training that fits its device must not be pushed off it."""
    return [p.detach().to("cpu", copy=True) for p in parameters]


def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@contextlib.contextmanager
def _without_mixed_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate wraps around a model's forward: it would round what is measured here."""
    own = {} if (before := model.__dict__.get("forward")) is None else {"forward": before}
    original = getattr(model, "_original_forward", None)
    if original is None or not own:
        yield
        return
    model.__dict__["forward"] = original
    try:
        yield
    finally:
        model.__dict__["forward"] = before
