"""`fast_delta_h1`: one call from a model, its optimizer and a batch of rollouts to a forecast with an error bar."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal, cast, get_args

import torch
from torch import nn

from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.config import ProbeConfig, Weighting
from entropy_fast.errors import ConfigError, RolloutsError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.offline_entropy_probe import OfflineEntropyProbe
from entropy_fast.probe_components import ProgressCallback
from entropy_fast.rollouts import Rollouts
from entropy_fast.step.adam_state import AdamState

__all__ = ["Engine", "check_engine", "fast_delta_h1"]

Engine = Literal["auto", "jvp", "one_pass", "two_pass"]


def check_engine(engine: str) -> Engine:
    """The engine of that name.

    Raises:
        ConfigError: there is none.
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"engine is {engine!r}.", fix=f"use one of {', '.join(map(repr, get_args(Engine)))}.")
    return cast(Engine, engine)


def fast_delta_h1(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | AdamState | str | os.PathLike[str],
    rollouts: Rollouts,
    entropy_rollouts: Rollouts | None = None,
    engine: Engine = "auto",
    weighting: Weighting | None = None,
    learning_rate: float | None = None,
    *,
    config: ProbeConfig | None = None,
    on_progress: ProgressCallback | None = None,
) -> DeltaH1Result:
    """Forecast how much the next update will change the policy's entropy, before it is taken.

    Call it before the training step's forward: a DistributedDataParallel forward that still waits for its backward would
    have its gradient synchronisation used up by the probe's.

    The model, its gradients, train/eval flags, random states and the optimizer are given back as they were, also when
    the probe raises.

    Args:
        model: a causal language model (LoRA or not, quantised base or not, DDP-wrapped or not).
        optimizer: the live ``torch.optim.Adam``/``AdamW`` that trains it, the path of an ``optimizer.pt``, or an
            `AdamState`. It must have stepped: the geometry comes from its second moments.
        rollouts: the batch the update will be made from. Alone, it is also where the entropy gradient is estimated.
        entropy_rollouts: an independent batch for the entropy gradient; then the two-batch estimate is returned, with
            the error conditional on the update.
        engine: ``auto``, which is ``one_pass`` (everything from one forward and one backward) unless an option asks for what
            ``two_pass``, the reference, alone has; or one of these by name; or ``jvp``, for a large ``entropy_rollouts``, which
            goes through it by forwards without a backward.
        weighting: length weight of a sequence log-prob, ``dr_grpo``, ``per_token`` or ``sequence``; None takes the one in
            ``config``, which is ``dr_grpo`` unless set.
        learning_rate: overrides the optimizer's (all groups rescaled alike).
        config: options, see `ProbeConfig` (microbatches, autocast, ...).
        on_progress: called with stage, prompts done, prompts in all.

    Returns:
        δH₁ in nats per the unit named in the result, with standard error, interval, shares and diagnostics.

    Raises:
        GradContextError: called under ``inference_mode`` or ``no_grad``.
        RolloutsError, OptimizerStateError, LearningRateError, ConfigError: bad input.
        ModelStateError, GraphDetachedError, GradientCoverageError, CheckpointingError, ForwardDerivativeError: the model cannot
            be probed as it is.
    """
    assert_grad_context("fast_delta_h1")
    check_engine(engine)
    for name, batch in (("rollouts", rollouts), ("entropy_rollouts", entropy_rollouts)):
        if not isinstance(batch, Rollouts) and not (name == "entropy_rollouts" and batch is None):
            raise RolloutsError(
                f"fast_delta_h1: `{name}` is a {type(batch).__name__}, expected Rollouts.",
                fix="build it with Rollouts(...) or, from the padded [B, G, T] form, Rollouts.from_dict(batch).",
            )
    if config is not None and not isinstance(config, ProbeConfig):
        raise ConfigError(f"fast_delta_h1: `config` is a {type(config).__name__}.", fix="pass ProbeConfig(...).")
    config = config or ProbeConfig()
    if weighting is not None:
        config = dataclasses.replace(config, weighting=weighting)
    probe = OfflineEntropyProbe(
        model,
        optimizer,
        config=config,
        learning_rate=learning_rate,
        on_progress=on_progress,
        engine=engine,
    )
    if entropy_rollouts is None:
        return probe.compute_delta_h1(rollouts)
    return probe.run_mixed_probe(entropy_rollouts, rollouts)
