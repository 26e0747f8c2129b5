"""A few sequences that every way is tried on before it is taken, and what the model itself says of them.

Numbers alone do not tell: on tokens that the policy is certain of, or in 16 bits, a model that goes another way may give almost
the same log-probs. So what a way leaves out of the model must do nothing (`skipped_modules_do_more`), and hidden states are
compared beside log-probs: they tell whatever the tokens are. Tolerances follow the dtype in which the decoder computes, not
that of the logits, which some libraries cast.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.checks.model_state import reentrant_checkpointing
from entropy_fast.checks.repeatability import check_repeatable
from entropy_fast.context import ProbeContext
from entropy_fast.errors import ModelStateError
from entropy_fast.libraries import prompt_learning, runs_its_own_forward
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.teacher_forcing import OutputHead, align_logprobs, find_output_head, model_logits, pad_rows

__all__ = ["Trial", "skipped_modules_do_more"]

# A prompt of at least so many tokens is tried, if there is one: of very few the next one says little about how they were
# attended to.
_PROMPT_TOKENS = 16
# Of a token's log-prob, nats.
_LOGPROBS = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOGPROBS_IN_16_BITS = 0.3
# Of a hidden state, relative to its length: of any token, and on average.
_HIDDEN = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-2, 1e-3)}
_HIDDEN_IN_16_BITS = (0.4, 0.1)
# Of a logit from the same hidden states, relative to the largest of all: what rounding the logits themselves leaves.
_LOGITS = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOGITS_IN_16_BITS = 0.02


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the model said of some rows.

    Attributes:
        logprobs: [M] of the scored tokens, row by row, nats.
        sequences: [n] their sums.
        hidden: [M, H] states that the output layer predicted them from; None where they were not seen.
        autocast: whether autocast was on inside the decoder, and its dtype.
    """

    logprobs: Tensor
    sequences: Tensor
    hidden: Tensor | None
    autocast: tuple[bool, torch.dtype] | None


class Trial:
    """The sequences, and the model's own forward of them.

    Args:
        context: the probe's; inside its ``probe_state``.
        rollouts: the batch.

    Attributes:
        context, rollouts: the same.
        head: the model's decoder and output layer; None where they cannot be told apart.
        rows: [2 or 3] indices into the rollouts.

    Raises:
        GraphDetachedError, RolloutsError: a log-prob is not finite.
        ModelStateError: two forwards of the same sequences differ.
    """

    def __init__(self, context: ProbeContext, rollouts: Rollouts) -> None:
        self.context, self.rollouts = context, rollouts
        self.head = find_output_head(context.registry.module)
        config = None if self.head is None else getattr(self.head.decoder, "config", None)
        self.rows = _trial_rows(
            rollouts, longest=bool(reentrant_checkpointing(context.model)) or _sees_a_window(config)
        )
        device = context.device.type
        with context.autocast():
            self._around = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._own = _see(context, rollouts, self.rows, self.head)
        # From another random state, so that randomness nobody switched off shows as a difference.
        torch.rand(1, device=context.device)
        if self.compute_dtype.itemsize < 4:
            # In 16 bits another way to the same log-probs rounds too differently to tell: the same way once more.
            again = _see(context, rollouts, self.rows, self.head)
            check_repeatable(self._own.sequences.double().cpu(), again.sequences.double().cpu(), self.rows)

    @property
    def expected(self) -> tuple[int, float] | None:
        """A row and its log-prob, which a microbatch should give again; None in 16 bits."""
        if self.compute_dtype.itemsize < 4:
            return None
        return int(self.rows[0]), float(self._own.sequences[0])

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the decoder's matrix products are taken in."""
        enabled, autocast = self._own.autocast or self._around
        if enabled:
            return autocast
        dtypes = [p.dtype for p in self.context.registry.module.parameters() if p.is_floating_point()]
        quantized = [getattr(m, "compute_dtype", None) for m in self.context.registry.module.modules()]
        known = [*dtypes, *(dtype for dtype in quantized if dtype is not None), self._own.logprobs.dtype]
        narrowest: torch.dtype = min(known, key=lambda dtype: torch.finfo(dtype).bits)
        return narrowest

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context of forwards that go past the model's own: autocast as it was seen inside of it."""
        if self._own.autocast is None:
            return self.context.autocast()
        enabled, dtype = self._own.autocast
        return torch.autocast(self.context.device.type, dtype=dtype, enabled=enabled)

    def other_logits(self, head: OutputHead) -> str | None:
        """How the model's own log-probs differ from those of its hidden states by the output layer; None where they do not."""
        if self._own.hidden is None:
            return "the model's forward does not run its decoder once, with hidden states as they are known"
        targets = self._targets()
        with torch.no_grad(), self.autocast():
            logits = head.logits(self._own.hidden, self.context.estimate.policy_temperature).double()
        found = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)
        difference = float((found - self._own.logprobs.double()).abs().max())
        allowed = _LOGITS.get(self.compute_dtype, _LOGITS_IN_16_BITS) * max(1.0, float(logits.abs().max()))
        if difference <= allowed:
            return None
        return f"the model does more to its logits than its output layer: log-probs differ by {difference:.3g} nats"

    def other_hidden(self, hidden: Tensor) -> str | None:
        """How hidden states [M, H] of another way differ from the model's own; None where they do not."""
        own = self._own.hidden
        if own is None or own.shape != hidden.shape:
            return f"hidden states {list(hidden.shape)} where the model has {None if own is None else list(own.shape)}"
        lengths = own.double().norm(dim=-1).clamp_min(1e-30)
        relative = (hidden.double() - own.double()).norm(dim=-1) / lengths
        most, mean = _HIDDEN.get(self.compute_dtype, _HIDDEN_IN_16_BITS)
        if float(relative.max()) <= most and float(relative.mean()) <= mean:
            return None
        return (
            f"hidden states differ by {float(relative.max()):.3g} of their length at most and {float(relative.mean()):.3g} on "
            f"average, where {self.compute_dtype} allows {most:g} and {mean:g}"
        )

    def refuse_interaction(self) -> None:
        """Raise when log-probs are random, or depend on the other sequences of a batch.

        Raises:
            ModelStateError: they do; then a sequence has no gradient of its own.
        """
        context, rows = self.context, _trial_rows(self.rollouts, longest=True)
        alone, again = ([_see(context, self.rollouts, row[None]).logprobs for row in rows] for _ in range(2))
        together = _see(context, self.rollouts, rows)
        first, second = (torch.stack([part.sum() for part in found]).double().cpu() for found in (alone, again))
        check_repeatable(first, second, rows)
        worst = float((together.logprobs.double() - torch.cat(alone).double()).abs().max())
        if not worst <= _LOGPROBS.get(self.compute_dtype, _LOGPROBS_IN_16_BITS):
            raise ModelStateError(
                f"sequences interact: log-probs of rows {rows.tolist()} in one forward differ by up to {worst:.3g} nats from "
                "those of the same rows in forwards of their own.",
                fix="remove what mixes rows (batch statistics, expert capacity limits); engine='two_pass' differentiates the "
                "prompts of a microbatch together, as the model is.",
            )

    def _targets(self) -> Tensor:
        batch = pad_rows(self.rollouts, self.rows, self.context.device)
        return batch.input_ids[batch.loss_mask == 1]


def skipped_modules_do_more(context: ProbeContext) -> str | None:
    """Why the decoder and the output layer are not all that the model's forward is; None where they are.

    Looked at: hooks, forwards of the instance's own, and adapters that put tokens of their own in front. What accelerate
    and TRL place there, which calls the class's own, changes nothing before outputs.
    """
    found = find_output_head(context.registry.module)
    if found is None:
        return "its decoder and output layer cannot be told apart"
    if prompt_learning(context.registry.module):
        return "its adapter puts tokens of its own before every sequence"
    inside = {id(module) for part in (found.decoder, found.module) for module in part.modules()}
    for name, module in context.registry.module.named_modules():
        if id(module) in inside or not _runs(module, found.decoder):
            continue
        called = name or type(module).__name__
        if module._forward_hooks or module._forward_pre_hooks:
            return f"'{called}' has forward hooks, which would not run"
        if "forward" in module.__dict__ and not runs_its_own_forward(module):
            return f"'{called}' has a forward of its own, which would not run"
    return None


def _runs(module: nn.Module, decoder: nn.Module) -> bool:
    """Whether a module outside of decoder and output layer is one of those around them."""
    return any(submodule is decoder for submodule in module.modules())


def _see(context: ProbeContext, rollouts: Rollouts, rows: Tensor, head: OutputHead | None = None) -> _Seen:
    """The model's own forward of some rows, looked at from outside and, with a ``head``, before its output layer."""
    batch = pad_rows(rollouts, rows, context.device)
    states: list[tuple[Any, tuple[bool, torch.dtype]]] = []
    with _watched(head, context.device.type, states), torch.no_grad(), context.autocast():
        logits = model_logits(context.registry.module, batch)
        forward = align_logprobs(logits, batch, temperature=context.estimate.policy_temperature)
    scored = forward.scored_tokens(rollouts, rows)
    hidden = None
    if len(states) == 1:
        found = getattr(states[0][0], "last_hidden_state", None)
        if isinstance(found, Tensor) and found.shape[:2] == batch.input_ids.shape:
            hidden = found[:, :-1][batch.loss_mask[:, 1:] == 1]
    return _Seen(scored.logprobs, scored.sequence_logprobs, hidden, states[0][1] if len(states) == 1 else None)


@contextlib.contextmanager
def _watched(
    head: OutputHead | None, device: str, states: list[tuple[Any, tuple[bool, torch.dtype]]]
) -> Iterator[None]:
    if head is None:
        yield
        return

    def look(_: nn.Module, __: Any, output: Any) -> None:
        states.append((output, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))))

    handle = head.decoder.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _trial_rows(rollouts: Rollouts, *, longest: bool) -> Tensor:
    """[2 or 3] sequences to try with: the two shortest answers to a short prompt, which cost little, and the longest."""
    attended, answered = rollouts.attention_mask.sum(-1).cpu(), rollouts.response_lengths.cpu()
    asked = attended - answered
    enough = asked >= min(_PROMPT_TOKENS, int(asked.max()))
    own = rollouts.rows_of_prompt(int(rollouts.prompt_index[int(asked.masked_fill(~enough, asked.max() + 1).argmin())]))
    chosen = own[answered[own].argsort(stable=True)[:2]].tolist()
    if longest:
        attended[chosen] = 0
        chosen.append(int(attended.argmax()))
    return torch.tensor(chosen)


def _sees_a_window(config: object) -> bool:
    """Whether a model's attention looks back a limited number of tokens, in some layer."""
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "sliding_window", None) is not None or any(kind != "full_attention" for kind in kinds)
