"""What every engine, way and capture is given: one model, one step, one set of options. Frozen: nobody writes into it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn

from entropy_fast.checks.exclusive import raise_if_interrupted
from entropy_fast.checks.model_state import probe_state, reentrant_checkpointing
from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.columns import Columns, TokenScores, columns_of
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.distributed.layout import Layout
from entropy_fast.distributed.team import Team
from entropy_fast.errors import ConfigError
from entropy_fast.resuming import Keeper
from entropy_fast.sharded import PartedSums
from entropy_fast.step import AdamPreconditioner, AdamState, NextStep, OptimizerAtHand, next_step_of, preconditioner_of

__all__ = ["ProbeContext", "ProgressCallback"]

ProgressCallback = Callable[[str, int, int], None]  # stage, prompts done, prompts in all


@dataclasses.dataclass(frozen=True)
class ProbeContext:
    """The setting of a probe.

    Attributes:
        model: a causal language model, possibly wrapped in DistributedDataParallel or compiled.
        registry: its trainable parameters, and the module that runs the forward.
        step: the optimizer's step as geometry: P of what is linear in the gradient.
        estimate: what is estimated.
        run: how it is run.
        columns: what sequences and tokens are weighed by, from ``estimate`` and what a call asks for.
        scores: what the policy says of the update batch, where the caller knows; None elsewhere.
        next_step: the step that the optimizer will take; None under ``adam_static``.
        notes: what is to be known of how the options were understood.
        prompts_of_batch: prompts of the batch that a live gradient is of, where a sample of them is gone through; None
            elsewhere.
        team: the ranks that work on it; this process alone unless ``ranks="all"``.
        parted: whose sums are kept where, and how gradients come there, where ranks have parameters of their own; None where
            each keeps all.
        keeper: who keeps what sweeps add up, for a process after this one; nobody unless ``checkpoint`` is set.
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
    next_step: NextStep | None = None
    notes: tuple[str, ...] = ()
    prompts_of_batch: int | None = None
    team: Team = dataclasses.field(default_factory=Team.alone)
    keeper: Keeper = dataclasses.field(default_factory=Keeper)
    parted: PartedSums | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: AdamState | OptimizerAtHand,
        estimate: EstimateOptions | None = None,
        run: RunOptions | None = None,
        on_progress: ProgressCallback | None = None,
        no_next_step: str | None = None,
        parted: PartedSums | None = None,
    ) -> ProbeContext:
        """Read off a model and its optimizer's state.

        Args:
            model: the model, possibly wrapped.
            optimizer: as it was read for this model.
            estimate: what is estimated; None takes the defaults.
            run: how it is run; None takes the defaults.
            on_progress: called with stage, prompts done and prompts in all.
            no_next_step: why the engine cannot take the optimizer's whole step; None where it can.
            parted: whose sums are kept where; None where this process keeps all.

        Raises:
            ConfigError: the whole step is asked for by name, and the engine cannot take it.
            ModelStateError, LearningRateError, OptimizerStateError: see `ParameterRegistry.build`, `AdamPreconditioner` and
                `next_step_of`.
        """
        estimate, run = estimate or EstimateOptions(), run or RunOptions()
        at_hand = OptimizerAtHand(optimizer) if isinstance(optimizer, AdamState) else optimizer
        registry = ParameterRegistry.build(model, at_hand.state.group_of)
        wanted, notes = wants_next_step(estimate, at_hand, no_next_step)
        kept = registry if parted is None else registry.pieces(parted.places, parted.cut)
        step = preconditioner_of(at_hand, kept, estimate, next_step=wanted)
        next_step = next_step_of(at_hand, kept, step, estimate) if wanted else None
        columns = columns_of(estimate)
        return cls(
            model, registry, step, estimate, run, columns, on_progress, next_step=next_step, notes=notes, parted=parted
        )

    @cached_property
    def kept(self) -> ParameterRegistry:
        """The parameters, or pieces of them, whose sums this process keeps, which `step` and `next_step` are of."""
        return self.registry if self.parted is None else self.registry.pieces(self.parted.places, self.parted.cut)

    @property
    def layout(self) -> Layout:
        """What this process has of gradients once a sweep is done."""
        return Layout(self.team, None if self.parted is None else self.parted.dealt, len(self.registry.parameters))

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


def wants_next_step(
    estimate: EstimateOptions, optimizer: OptimizerAtHand, no_next_step: str | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether the optimizer's whole step is forecast, and what is to be said of that.

    Raises:
        ConfigError: it is asked for by name, or by an option that belongs to it, and the engine cannot take it.
    """
    asked = estimate.step == "next" or bool({"max_grad_norm", "gradient"} & set(estimate.changed()))
    if no_next_step is None:
        return asked or (estimate.step is None and optimizer.live is not None), ()
    if asked:
        raise ConfigError(f"step='next': {no_next_step}.", fix="use engine='one_pass', or step='adam_static'.")
    if estimate.step is None and optimizer.live is not None:
        return False, (f"the step is Adam's static geometry, not the optimizer's whole next step: {no_next_step}.",)
    return False, ()
