"""What every engine, way and capture is given: one model, one step, one set of options. Frozen: nobody writes into it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from entropy_fast.checks.exclusive import raise_if_interrupted
from entropy_fast.checks.model_state import probe_state, reentrant_checkpointing
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.columns import Columns, TokenScores, columns_of
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.step import AdamPreconditioner, AdamState

__all__ = ["ProbeContext", "ProgressCallback"]

ProgressCallback = Callable[[str, int, int], None]  # stage, prompts done, prompts in all


@dataclasses.dataclass(frozen=True)
class ProbeContext:
    """The setting of a probe.

    Attributes:
        model: a causal language model, possibly wrapped in DistributedDataParallel or compiled.
        registry: its trainable parameters, and the module that runs the forward.
        step: the optimizer's step as geometry.
        estimate: what is estimated.
        run: how it is run.
        columns: what sequences and tokens are weighed by, from ``estimate`` and what a call asks for.
        scores: what the policy says of the update batch, where the caller knows; None elsewhere.
        on_progress: called with stage, prompts done and prompts in all.
    """

    model: nn.Module
    registry: ParameterRegistry
    step: AdamPreconditioner
    estimate: EstimateOptions
    run: RunOptions
    columns: Columns
    on_progress: ProgressCallback | None = None
    scores: TokenScores | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        state: AdamState,
        estimate: EstimateOptions | None = None,
        run: RunOptions | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> ProbeContext:
        """Read off a model and its optimizer's state.

        Args:
            model: the model, possibly wrapped.
            state: the optimizer's Adam state for this model.
            estimate: what is estimated; None takes the defaults.
            run: how it is run; None takes the defaults.
            on_progress: called with stage, prompts done and prompts in all.

        Raises:
            ModelStateError, LearningRateError: see `ParameterRegistry.build` and `AdamPreconditioner`.
        """
        estimate, run = estimate or EstimateOptions(), run or RunOptions()
        registry = ParameterRegistry.build(model, state.group_of)
        step = AdamPreconditioner(state, registry, estimate.learning_rate)
        return cls(model, registry, step, estimate, run, columns_of(estimate), on_progress)

    @property
    def device(self) -> torch.device:
        """Where the first trainable parameter is; inputs are sent there."""
        return self.registry.tensors[0].device

    @property
    def sums_device(self) -> torch.device | None:
        """Where sums of gradients are kept; None for every parameter's own device."""
        return torch.device("cpu") if self.run.accumulate_on == "cpu" else None

    @property
    def compute_dtypes(self) -> set[torch.dtype]:
        """Dtypes of the trainable parameters and, where it is set, of autocast."""
        autocast = self.run.torch_autocast_dtype
        return {p.dtype for p in self.registry.tensors} | (set() if autocast is None else {autocast})

    def probe_state(self) -> contextlib.AbstractContextManager[None]:
        """Context in which passes run: dropout off, gradients set aside; the model is restored on the way out."""
        return probe_state(self.model)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context of every forward: autocast with the configured dtype, or nothing."""
        dtype = self.run.torch_autocast_dtype
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell the caller how far a stage has come; a safe moment for an interrupt.

        Raises:
            KeyboardInterrupt: one has come.
        """
        raise_if_interrupted()
        if self.on_progress is not None:
            self.on_progress(stage, done, total)

    @property
    def likely_cause(self) -> str:
        """Why a backward would reach no parameter of this model."""
        name = reentrant_checkpointing(self.model)
        if name is not None:
            return (
                f"'{name}' uses reentrant gradient checkpointing and its input does not require grad "
                "(call model.enable_input_require_grads())."
            )
        return "the trainable parameters are not used by this forward (an inactive or disabled adapter?)."
