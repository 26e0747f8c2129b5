"""What a TRL trainer says while it makes a step, by patches on that one trainer, taken back when the training ends.

Legend: L the loss that is backpropagated, s_t log-prob and H_t entropy of completion token t.

    _generate_and_score_completions      every response is told its prompt's number, the step it was born at, and its reward
    _calculate_rewards                   the rewards that go into the advantages
    _compute_loss                        which micro-batches make up the step
    accelerator.clip_grad_norm_          what the gradient is multiplied by
    _get_per_token_logps_and_entropies   s_t and H_t, and hooks on both that see ∂L/∂s_t and ∂L/∂H_t in its own backward

Neither values nor random draws change: a hook that returns nothing leaves the gradient as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.step.next_step import CLIP_EPS

__all__ = ["BORN", "GROUP", "REWARD", "Clipped", "MicroBatch", "TrainerHooks"]

GROUP, BORN, REWARD = TAGS = ("entropy_fast_group", "entropy_fast_born", "entropy_fast_reward")
CLIP = "clip_grad_norm_"
PATCHED = (
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
)


@dataclasses.dataclass(eq=False)
class MicroBatch:
    """One micro-batch of the window, of n rows and C completion tokens.

    Attributes:
        inputs: as the trainer's loss gets them, with our tags.
        logprobs: [n, C] s_t, detached; None until they are computed.
        entropies: [n, C] H_t, likewise; None also where the trainer does not compute them.
        by_logprob: [n, C] ∂L/∂s_t; None until the backward.
        by_entropy: [n, C] ∂L/∂H_t; None where the loss has no gradient by entropies.
    """

    inputs: dict[str, Any]
    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    by_logprob: Tensor | None = None
    by_entropy: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Clipped:
    """What clipping did to a step's gradient.

    Attributes:
        factor: that it was multiplied by.
        norm: of the gradient before; None where nothing measured it, so that an fp16 scaler's factor is still in it.
    """

    factor: float = 1.0
    norm: float | None = None


class TrainerHooks:
    """Collects the micro-batches of every step of a trainer.

    Args:
        trainer: a ``trl.GRPOTrainer``, or one of a class made from it.

    Attributes:
        window: of the step that is being made.
        clipped: what clipping did to its gradient, so far.
        problem: what could not be listened to, last; None for nothing.

    Raises:
        ConfigError: the trainer has not the methods that are listened to.
    """

    def __init__(self, trainer: Any) -> None:
        missing = [name for name in PATCHED if not callable(getattr(trainer, name, None))]
        if missing:
            raise ConfigError(
                f"a {type(trainer).__name__} has no {', '.join(missing)}, which a forecast listens to.",
                fix="use trl.GRPOTrainer or a class made from it (tried with TRL 1.16); for other trainers, "
                "entropy_fast.integrations.loops.forecast_step.",
            )
        self.window: list[MicroBatch] = []
        self.clipped = Clipped()
        self.problem: str | None = None
        self._trainer = trainer
        self._current: MicroBatch | None = None
        self._rewards: list[Tensor] = []  # of the generation that is being made
        self._groups = 0
        self._clip_before: object | None = None
        self._before: dict[str, object] | None = None  # what the instance itself had under the patched names

    def patch(self) -> None:
        """Put the patches on; nothing where they are on."""
        if self._before is not None:
            return
        trainer = self._trainer
        self._clip_before = trainer.accelerator.__dict__.get(CLIP)
        self._before = {name: trainer.__dict__[name] for name in PATCHED if name in trainer.__dict__}
        makers = (self._generating, self._rewarding, self._losing, self._scoring)
        for name, maker in zip(PATCHED, makers, strict=True):
            setattr(trainer, name, maker(getattr(trainer, name)))
        setattr(trainer.accelerator, CLIP, self._clipping(getattr(trainer.accelerator, CLIP)))

    def begin(self) -> None:
        """A new step."""
        self.window, self.clipped = [], Clipped()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Nothing that is looked at here may end the training; what went wrong is a forecast's reason."""
        try:
            yield
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    def unpatch(self) -> None:
        """Take them off, and forget the window."""
        before, self._before = self._before, None
        if before is not None:
            self._trainer.accelerator.__dict__.pop(CLIP, None)
            if self._clip_before is not None:
                setattr(self._trainer.accelerator, CLIP, self._clip_before)
            for name in PATCHED:
                self._trainer.__dict__.pop(name, None)
                if name in before:
                    setattr(self._trainer, name, before[name])
        self._current = None
        self.begin()

    def _generating(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._rewards.clear()
            found = original(inputs, *args, **kwargs)
            with self.listening():
                self._tag(found)
            return found

        return generate

    def _tag(self, found: Any) -> None:
        """Tell every response of a generation its prompt's number, when it was born, and its reward."""
        trainer = self._trainer
        if trainer.model.training:
            ids, accelerator = found["completion_ids"], trainer.accelerator
            # Rows of all processes are the whole batch, prompt by prompt; a prompt's may be on two of them.
            everywhere, first = len(ids) * accelerator.num_processes, len(ids) * accelerator.process_index
            rows = torch.arange(first, first + len(ids), device=ids.device)
            found[GROUP] = rows // trainer.num_generations + self._groups
            found[BORN] = torch.full_like(rows, trainer.state.global_step)
            self._groups += -(-everywhere // trainer.num_generations)
            if self._rewards and len(self._rewards[-1]) == everywhere:
                found[REWARD] = self._rewards[-1][first : first + len(ids)].to(ids.device)

    def _rewarding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def calculate(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            with self.listening():
                weights = torch.as_tensor(self._trainer.reward_weights, dtype=torch.float64, device=found.device)
                rewards = (found.detach().double() * weights).nansum(1)
                # No function could say anything of these responses: unknown, not 0.
                self._rewards.append(rewards.masked_fill(found.isnan().all(1), math.nan))
            return found

        return calculate

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            norm = original(parameters, max_norm, *args, **kwargs)
            with self.listening():
                if norm is not None:
                    factor = min(1.0, float(max_norm) / (float(norm) + CLIP_EPS))
                    self.clipped = Clipped(self.clipped.factor * factor, float(norm))
            return norm

        return clip

    def _losing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with self.listening():
                if self._trainer.model.training and torch.is_grad_enabled():
                    self._current = MicroBatch(inputs)
                    self.window.append(self._current)
            try:
                return original(model, inputs, *args, **kwargs)
            finally:
                self._current = None

        return compute_loss

    def _scoring(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def score(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            batch = self._current
            if batch is None or batch.logprobs is not None or not torch.is_grad_enabled():
                return found
            with self.listening():
                logprobs, entropies = found[0], found[1]
                batch.logprobs = logprobs.detach()
                if logprobs.requires_grad:
                    logprobs.register_hook(self._keeping(batch, "by_logprob"))
                if entropies is not None:
                    batch.entropies = entropies.detach()
                    if entropies.requires_grad:
                        entropies.register_hook(self._keeping(batch, "by_entropy"))
            return found

        return score

    def _keeping(self, batch: MicroBatch, name: str) -> Callable[[Tensor], None]:
        """A hook that keeps a gradient, added up where there are several backwards."""

        def keep(gradient: Tensor) -> None:
            with self.listening():  # it runs within the trainer's backward
                own, before = gradient.detach().double(), getattr(batch, name)
                setattr(batch, name, own if before is None else before + own)

        return keep
