"""What the previous step did, from responses that had no part in it: those of the window after.

Legend: θ the policy before the step, θ' after it, y responses sampled from θ'.

The responses of the next window come from θ' and know nothing of the samples that made the step or its forecast. Scored under
both policies they give, by importance weights π_θ(y)/π_θ'(y), how the entropy changes from θ' back to θ, and with the other
sign what the step did. Prompts are those of the next window.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.columns import TokenScores
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.rollouts import Rollouts
from entropy_fast.truth import Scored, scored

__all__ = ["KeptPolicy", "Realised", "trainable_parameters"]


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
    """Parameters that a step may move."""
    return [p for p in unwrap_model(model).parameters() if p.requires_grad]


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
    ) -> Realised:
        """How the expected entropy has changed from the policy that was kept to the one that the model is now.

        Parameters come back bit by bit, also after an exception.

        Args:
            optimizer: of the model.
            responses: sampled from the policy as it is now.
            estimate: of the forecast.
            run: likewise.

        Raises:
            RolloutsError, ModelStateError, OptimizerStateError, ConfigError: see `fast_delta_h1`.
        """
        now, then = self._both(optimizer, responses, estimate, run)
        back = now.change_to(then)
        return Realised(
            -back.total, back.total_std_error, -back.direct, back.direct_std_error, back.ess, back.pareto_k,
            now.rollouts.n_prompts,
        )  # fmt: skip

    def change_by_step(
        self, optimizer: torch.optim.Optimizer, responses: Rollouts, *, estimate: EstimateOptions, run: RunOptions
    ) -> Realised:
        """The same from responses that were sampled from the policy that was kept; see `change_since`."""
        now, then = self._both(optimizer, responses, estimate, run)
        change = dataclasses.replace(now, scores=then).change_to(now.scores)
        return Realised(
            change.total, change.total_std_error, change.direct, change.direct_std_error, change.ess, change.pareto_k,
            now.rollouts.n_prompts,
        )  # fmt: skip

    def _both(
        self, optimizer: torch.optim.Optimizer, responses: Rollouts, estimate: EstimateOptions, run: RunOptions
    ) -> tuple[Scored, TokenScores]:
        """Responses under the policy as it is now, and under the one that was kept."""
        parameters = trainable_parameters(self._model)
        with _without_mixed_precision(self._model):
            now = scored(self._model, optimizer, responses, estimate=estimate, run=run)
            here = _copied(parameters)
            try:
                _put(parameters, self._kept)
                _, then = now.again()
            finally:
                _put(parameters, here)
        return now, then


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
