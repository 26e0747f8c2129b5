"""`OfflineEntropyProbe`: from rollouts to a `DeltaH1Result` by one of the engines."""

from __future__ import annotations

import os
import warnings

import torch
from torch import nn

from entropy_fast.checks.fit import check_rollouts_fit_model
from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.columns.coefficients import check_group_sizes
from entropy_fast.columns.token_coefficients import check_old_logprobs
from entropy_fast.config import EstimateOptions, ProbeConfig, RunOptions
from entropy_fast.engines.forward_mode.engine import ForwardModeEngine
from entropy_fast.engines.one_pass.engine import OnePassEngine
from entropy_fast.errors import ConfigError, EntropyFastWarning, RolloutsError
from entropy_fast.estimates import assembly
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.probe_components import ProbeComponents, ProgressCallback
from entropy_fast.rollouts import EmptyResponseReport, Rollouts
from entropy_fast.step import AdamState, adam_state_from_file

__all__ = ["ENGINES", "OfflineEntropyProbe"]

ENGINES = ("auto", OnePassEngine.name, "two_pass", ForwardModeEngine.name)


class OfflineEntropyProbe:
    """Probes one model with one optimizer state; build it again when either changes.

    Args:
        model: a causal language model, possibly wrapped.
        optimizer: live Adam/AdamW, path of an ``optimizer.pt``, or `AdamState`.
        estimate: what is estimated; None takes the defaults.
        run: how it is run; None takes the defaults.
        on_progress: called with stage, prompts done and prompts in all.

    Raises:
        ConfigError: there is no such engine, or it cannot do what ``config`` asks for.
        OptimizerStateError, LearningRateError, ModelStateError: the three do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | AdamState | str | os.PathLike[str],
        *,
        estimate: EstimateOptions | None = None,
        run: RunOptions | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        config = ProbeConfig(estimate, run)
        engine, learning_rate = config.run.engine, config.estimate.learning_rate
        if engine not in ENGINES:
            raise ConfigError(
                f"OfflineEntropyProbe: engine is {engine!r}.", fix=f"use one of {', '.join(map(repr, ENGINES))}."
            )
        self.engine = _chosen(config) if engine == "auto" else engine
        if config.by_sequence and self.engine != OnePassEngine.name:
            raise ConfigError(
                f"OfflineEntropyProbe: by_sequence with engine {self.engine!r}, which does not take sums apart by sequence.",
                fix="pass engine='one_pass'.",
            )
        state = _adam_state(optimizer, model)
        self.components = ProbeComponents(model, state, config, learning_rate, on_progress)

    @property
    def config(self) -> ProbeConfig:
        """The options in force."""
        return self.components.config

    def compute_delta_h1(self, rollouts: Rollouts) -> DeltaH1Result:
        """Same-batch estimate: δH₁ = lr · U.

        Raises:
            GradContextError: called under ``inference_mode`` or ``no_grad``.
            RolloutsError: fewer than two prompts, a prompt with one response (``entropy_estimator="score_function"``), no
                ``old_logprobs`` for ``importance_ratio="token"``, or nothing left.
            ConfigError: the engine is ``jvp``, which has no diagonal.
        """
        assert_grad_context("OfflineEntropyProbe.compute_delta_h1")
        if self.engine == ForwardModeEngine.name:
            raise ConfigError(
                "compute_delta_h1: engine 'jvp' has derivatives along the sum of all updates; the same-batch estimate takes "
                "out every prompt's product with its own update, the diagonal K_nn, which needs each Y_n by itself.",
                fix="pass entropy_rollouts, an independent batch, for the two-batch estimate; or use engine='one_pass' or "
                "'two_pass'.",
            )
        check_old_logprobs(self.config, rollouts)  # now, and not in the middle of the work
        batch, empty = self._prepare(rollouts)
        if batch.n_prompts < 2:
            raise RolloutsError(
                f"the same-batch estimate needs at least 2 prompts with responses, found {batch.n_prompts}.",
                fix="probe more prompts, or pass entropy_rollouts for the two-batch estimate.",
            )
        components = self.components
        if self.engine == OnePassEngine.name:
            one_pass = OnePassEngine(components)
            sums = one_pass.kernel_sums(batch)
            self._note(one_pass)
        elif self.config.mode == "blocks":
            sums = components._compute_delta_h1_blocks(batch)
        else:
            sums = components._compute_delta_h1_exact(batch)
        return assembly.same_batch_result(components, self.engine, batch, empty, sums)

    def run_mixed_probe(self, *, entropy_rollouts: Rollouts, update_rollouts: Rollouts) -> DeltaH1Result:
        """Two-batch estimate: δH₁ = lr · X̄_E · Ȳ_U, its error conditional on the update batch.

        Args:
            entropy_rollouts: E, where the entropy gradient is estimated.
            update_rollouts: U, what the update is made from; independent of E.

        Raises:
            GradContextError: called under ``inference_mode`` or ``no_grad``.
            RolloutsError: the two are the same batch, or one of them cannot be used.
            ConfigError: ``mode="blocks"``, which has no meaning here.
            ForwardDerivativeError: the engine is ``jvp``, and the model has an operation that it cannot go through.
        """
        assert_grad_context("OfflineEntropyProbe.run_mixed_probe")
        if self.config.mode == "blocks":
            raise ConfigError(
                "run_mixed_probe: mode='blocks' groups the units of the same-batch estimate; the two-batch estimate has none.",
                fix="use mode='exact', or leave the entropy batch out.",
            )
        if entropy_rollouts.shares_all_sequences_with(update_rollouts):
            raise RolloutsError(
                "run_mixed_probe: every sequence of one batch stands in the other too; X̄·Ȳ of one batch with itself is "
                "biased by the diagonal K_nn.",
                fix="pass independently sampled batches, or use compute_delta_h1 for one batch.",
            )
        check_old_logprobs(self.config, update_rollouts)
        entropy, empty_entropy = self._prepare(entropy_rollouts)
        update, empty_update = self._prepare(update_rollouts)
        if self.engine == OnePassEngine.name:
            one_pass = OnePassEngine(self.components)
            sums = one_pass.cross_sums(entropy, update)
            self._note(one_pass)
        elif self.engine == ForwardModeEngine.name:
            forward_mode = ForwardModeEngine(self.components)
            sums = forward_mode.cross_sums(entropy, update)
            self.components.plan, self.components.notes = forward_mode.plan, forward_mode.notes
        else:
            sums = self.components.compute_cross_sums(entropy, update)
        return assembly.two_batch_result(
            self.components, self.engine, entropy, update, {"entropy": empty_entropy, "update": empty_update}, sums
        )

    def _note(self, one_pass: OnePassEngine) -> None:
        self.components.plan = one_pass.plan
        notes = [] if one_pass.note is None else [one_pass.note]
        if self.config.full_kernel and not one_pass.plan.kernel_kept:
            notes.append(
                "full_kernel was asked for, but the gradients of all units do not fit memory_budget; K was not kept."
            )
        if self.config.conditional_variance == "alpha" or self.config.y_pass != "backward":
            notes.append("conditional_variance and y_pass are options of the two-pass engine; they were not used.")
        self.components.notes = notes
        if one_pass.note is not None:
            warnings.warn(one_pass.note, EntropyFastWarning, stacklevel=3)

    def _prepare(self, rollouts: Rollouts) -> tuple[Rollouts, EmptyResponseReport]:
        batch, empty = rollouts.for_autograd().without_empty_responses()
        if empty.sequences:
            warnings.warn(assembly.empty_response_message(empty), EntropyFastWarning, stacklevel=3)
        if self.config.entropy_estimator == "score_function":
            check_group_sizes(batch)
        check_rollouts_fit_model(batch, self.components.registry.module)
        return batch, empty


def _chosen(config: ProbeConfig) -> str:
    """The engine of ``auto``."""
    plain = config.conditional_variance == "per_prompt" and config.y_pass == "backward"
    return OnePassEngine.name if plain else "two_pass"


def _adam_state(optimizer: torch.optim.Optimizer | AdamState | str | os.PathLike[str], model: nn.Module) -> AdamState:
    if isinstance(optimizer, AdamState):
        return optimizer
    if isinstance(optimizer, (str, os.PathLike)):
        return adam_state_from_file(optimizer, model)
    return AdamState.from_optimizer(optimizer, model)
