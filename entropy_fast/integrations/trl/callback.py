"""Forecasts inside TRL: `EntropyForecastCallback` on a trainer, or `EntropyForecastMixin` in a class of one's own."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.integrations.forecast_options import ForecastOptions, forecast_options
from entropy_fast.integrations.forecaster import StepForecaster
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.integrations.training_ranks import TrainingRanks
from entropy_fast.integrations.trl.batches import NUMBERS, window_of
from entropy_fast.integrations.trl.held_out import HeldOutResponses
from entropy_fast.integrations.trl.hooks import TrainerHooks
from entropy_fast.integrations.trl.same_policy import check_same_policy
from entropy_fast.integrations.trl.setting import autocast_of, refuse_setting, sampling_of, sharded_by_fsdp2
from entropy_fast.run_folder.bundle import write_bundle

__all__ = ["EntropyForecastCallback", "EntropyForecastMixin"]

PREFIX = "entropy_fast/"


class EntropyForecastCallback(TrainerCallback):
    """Says before every step of a GRPO trainer what it will do to the entropy, and after it what it did.

        trainer = GRPOTrainer(...)
        trainer.add_callback(EntropyForecastCallback(trainer))

    Add it last: a callback that changes gradients after this one changes the step. Forecasts are of the policy that the
    trainer itself means, softmax(logits/T) at its sampling temperature, and of the mean entropy over all response tokens, which
    it logs. Metrics stand beside the trainer's own under ``entropy_fast/``. What fails is a warning, once, and NaN; the
    training goes on as it would without.

    Args:
        trainer: a ``trl.GRPOTrainer`` (tried with TRL 1.16), in one process or in several with DistributedDataParallel or
            FSDP2, which then make every forecast together, of all their rows. All of them have one with the same options.
        functionals: what else is forecast: ``reward`` and ``length``.
        bundle: folder that steps are kept in, one folder each, for `entropy-fast probe FOLDER`; None keeps none.
        bundle_every: keep one step in so many: the first of them that is forecast.
        **options: those of `ForecastOptions`: ``every_n_steps``, ``budget``, ``sample``, ``candidates``, ``verify``, ... Of
            ``estimate`` the policy's temperature is always the trainer's, and ``run`` is in its autocast where it is not given.
            With ``verify="held_out"`` and without ``held_out``, responses are sampled for prompts of the trainer's data set
            that have no part in the step, by draws of their own.

    Attributes:
        forecaster: with the ledger and the last forecast; None before the training begins.

    Raises:
        ConfigError: the trainer cannot be listened to, or trains in a way whose steps cannot be forecast.
        ModelStateError: its model is sharded otherwise than by FSDP2.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        functionals: Sequence[str] = NUMBERS,
        bundle: str | os.PathLike[str] | None = None,
        bundle_every: int = 100,
        **options: Any,
    ) -> None:
        refuse_setting(trainer)
        sharded = sharded_by_fsdp2(trainer)
        if sharded and bundle is not None:
            raise ConfigError(
                "bundle: FSDP2 shards the model, so that no process has the whole of a step to write down.",
                fix="leave bundle out, or train in one process or with DistributedDataParallel.",
            )
        unknown = [name for name in functionals if name not in NUMBERS]
        if unknown:
            raise ConfigError(f"functionals: {unknown[0]!r} is not known.", fix=f"use some of {', '.join(NUMBERS)}.")
        self.forecaster = StepForecaster(
            trainer.model,
            trainer.optimizer,  # None until the training begins
            _options(trainer, forecast_options(options)),
            keep=None if bundle is None else self._keep,
            ranks=TrainingRanks(sharded or trainer.accelerator.num_processes > 1, _seconds(options.get("run"))),
        )
        self._bundle = None if bundle is None else Path(bundle)
        if isinstance(bundle_every, bool) or not isinstance(bundle_every, int) or bundle_every < 1:
            raise ConfigError(f"bundle_every is {bundle_every!r}.", fix="use a whole number from 1.")
        self._bundle_every, self._keep_from = bundle_every, 0
        # What truncated sampling visits is another policy's: the direct part alone can be forecast, and no functional.
        self._trainer = trainer
        self._functionals = () if sampling_of(trainer).truncates else tuple(functionals)
        self._hooks = TrainerHooks(trainer)
        self._same_policy = False  # whether that is known, where dropout hides it
        self._since: float | None = None  # when training time was last counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Listen."""
        with self._hooks.listening():
            self._keep_from = state.global_step
            self._hooks.patch()
            self.forecaster.begin(state.global_step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a new window."""
        self._since = time.perf_counter()
        with self._hooks.listening():
            self._hooks.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forecast: gradients are clipped, and the learning rate is the one about to be used."""
        forecaster, trainer = self.forecaster, self._trainer
        with forecaster.never_breaks("no forecast"):
            if not forecaster.wants(state.global_step):
                return
            self._count()
            forecaster.model, forecaster.optimizer = trainer.model, trainer.optimizer
            forecast = forecaster.before_step(state.global_step, self._window)
            for name, value in forecast.metrics().items():
                trainer._metrics["train"][PREFIX + name].append(float(value))
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let go of the batch; stop where a hook on forecasts asks for it."""
        with self._hooks.listening():
            self._hooks.begin()
            self._count()
            if self.forecaster.stop:
                control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the trainer as it was."""
        with self.forecaster.never_breaks("the trainer is not as it was"):
            self._hooks.unpatch()
        with self.forecaster.never_breaks("what was kept is not let go of"):
            self.forecaster.end()

    def _window(self) -> StepWindow:
        hooks = self._hooks
        if hooks.problem is not None:
            problem, hooks.problem = hooks.problem, None
            raise ConfigError(
                f"the trainer could not be listened to ({problem}).", fix="look at what its own methods return."
            )
        trainer, forecaster = self._trainer, self.forecaster
        window = window_of(trainer, hooks.window, self._functionals, hooks.clipped)
        if window.scores is None and sharded_by_fsdp2(trainer):
            raise ConfigError(
                "FSDP2 shards the model, and dropout (or a loss without entropies) hides whether the trainer's policy is the "
                "model's own, which one process alone cannot score.",
                fix="train without dropout to have forecasts.",
            )
        if window.scores is None and not self._same_policy:
            self._same_policy = check_same_policy(
                trainer, hooks.window, window.rollouts, estimate=forecaster.estimate, run=forecaster.run
            )
        return dataclasses.replace(window, clip=hooks.clipped.factor, decode=_decoder(trainer))

    def _keep(self, step: int, window: StepWindow, result: DeltaH1Result) -> None:
        """Write a step down, where it is one of those that are kept."""
        if self._bundle is None or step < self._keep_from:
            return
        self._keep_from = (step // self._bundle_every + 1) * self._bundle_every
        trainer = self._trainer
        self._bundle.mkdir(parents=True, exist_ok=True)
        write_bundle(
            self._bundle / f"step-{step:06d}",
            model=trainer.model,
            optimizer=trainer.optimizer,
            rollouts=window.rollouts,
            coefficients=(window.of_logprob, window.of_entropy),
            estimate=result.estimate_options,
            run=dataclasses.replace(result.run_options, ranks="own"),  # it is one process that will look at it
            step=step,
            facts={
                "trainer": type(trainer).__name__,
                "loss": str(trainer.loss_type),
                "beta": float(trainer.beta),
                "clip": window.clip,
            },
            base_model=_base_model(trainer.model),
            tokenizer=trainer.processing_class,
            result=result,
            scores=window.scores,
        )

    def _count(self) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self.forecaster.time.train(now - self._since)
        self._since = now


class EntropyForecastMixin:
    """For trainers of one's own: ``class MyTrainer(EntropyForecastMixin, GRPOTrainer)``.

    Args:
        *args: of the trainer.
        entropy_forecast: options of `EntropyForecastCallback`; None for its defaults.
        **kwargs: of the trainer.

    Attributes:
        entropy_forecast: the callback.

    Raises:
        ConfigError: see `EntropyForecastCallback`.
    """

    def __init__(self, *args: Any, entropy_forecast: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entropy_forecast = EntropyForecastCallback(self, **(entropy_forecast or {}))
        self.add_callback(self.entropy_forecast)  # type: ignore[attr-defined]


def _base_model(model: Any) -> str | None:
    """Where an adapter's base is from; None for a model that is trained itself."""
    return getattr(model.config, "_name_or_path", None) if hasattr(model, "peft_config") else None


def _options(trainer: Any, given: ForecastOptions) -> ForecastOptions:
    """With what the trainer says where nothing was said."""
    held_out = given.held_out
    if given.verify == "held_out" and held_out is None:
        if sharded_by_fsdp2(trainer):
            raise ConfigError(
                "verify='held_out': FSDP2 shards the model, and processes that sample responses of their own do not keep step.",
                fix="use verify='previous', or pass held_out, a function that returns the same responses on all of them.",
            )
        held_out = HeldOutResponses(trainer)
    return dataclasses.replace(
        given,
        held_out=held_out,
        estimate=_estimate(trainer, given.estimate),
        run=given.run or RunOptions(autocast_dtype=autocast_of(trainer)),
    )


def _seconds(run: RunOptions | None) -> float:
    """That ranks wait for one another."""
    return (run or RunOptions()).rank_timeout


def _decoder(trainer: Any) -> Callable[[int], str] | None:
    decode = getattr(trainer.processing_class, "decode", None)
    return None if decode is None else lambda token: str(decode([token]))


def _estimate(trainer: Any, given: EstimateOptions | None) -> EstimateOptions:
    found = dataclasses.replace(
        given or EstimateOptions(weighting="pooled"), policy_temperature=float(trainer.temperature)
    )
    return dataclasses.replace(found, parts=("direct",)) if sampling_of(trainer).truncates else found
