"""Padded whole sequences, with log-probs from hidden states where the output layer allows that, or from the model's own logits.

Parameters that are not captured get their gradients here from backwards of their own, one for each that is wanted.

Legend: S_i sequence log-prob, w_ci the coefficient of sequence i in column c.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ClassVar

import torch

from entropy_fast.capture import CapturedModules, RowRecorder
from entropy_fast.checks.grad_context import assert_attached
from entropy_fast.columns import Coefficients, ScoredTokens
from entropy_fast.columns.coefficients import power_of_two_scale
from entropy_fast.context import ProbeContext
from entropy_fast.ways.teacher_forcing.batch import pad_rows
from entropy_fast.ways.teacher_forcing.forward import ForwardResult, align_logprobs, model_logits
from entropy_fast.ways.teacher_forcing.output_layer import OutputLayer, find_output_head, hidden_logprobs
from entropy_fast.ways.trial import Trial, skipped_modules_do_more
from entropy_fast.ways.way import Microbatch, Passed

__all__ = ["HiddenStatesWay", "LogitsWay"]


class LogitsWay:
    """The model's own logits: the way that every causal language model can go.

    Args:
        context: of the probe.
        modules: whose parameters are captured.
    """

    name: ClassVar[str] = "logits"
    packs: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    weighs_whole: ClassVar[bool] = True
    prompt_forwards: ClassVar[int] = 1

    def __init__(self, context: ProbeContext, modules: CapturedModules) -> None:
        self._context, self._modules = context, modules
        self._autocast: Callable[[], contextlib.AbstractContextManager[object]] = context.autocast

    def __str__(self) -> str:
        return "whole sequences, the model's own logits"

    def why_not(self, trial: Trial) -> str | None:
        """See `Way.why_not`; sequences of one batch must not interact."""
        trial.refuse_interaction()
        return None

    def run(self, microbatch: Microbatch, recorder: RowRecorder) -> Passed:
        """See `Way.run`."""
        recorder.pause()
        forward = self._forward(microbatch, want_entropies=microbatch.columns.needs_entropies)
        assert_attached("S", forward.sequence_logprobs, type(self).__name__)
        scored = forward.scored_tokens(microbatch.rollouts, microbatch.rows)
        coefficients = microbatch.columns.weigh(scored)
        self._slower_path(forward, coefficients, microbatch, recorder)
        backwards = coefficients.backwards()
        for number, backward in enumerate(backwards, 1):
            recorder.expect(microbatch.unit, backward.weights, forward.token_logprobs.shape[1] + 1)
            loss = backward.loss(forward.logprobs, forward.entropies)
            torch.autograd.backward(loss, retain_graph=number < len(backwards))
        recorder.pause()
        return Passed.of(scored, coefficients)

    def score(self, microbatch: Microbatch) -> ScoredTokens:
        """See `Way.score`."""
        with torch.no_grad():
            forward = self._forward(microbatch, want_entropies=True)
        return forward.scored_tokens(microbatch.rollouts, microbatch.rows)

    def _forward(self, microbatch: Microbatch, *, want_entropies: bool) -> ForwardResult:
        batch = pad_rows(microbatch.rollouts, microbatch.rows, self._context.device)
        with self._autocast():
            logits = model_logits(self._context.registry.module, batch)
        if torch.is_grad_enabled():
            assert_attached("logits", logits, type(self).__name__)
        return align_logprobs(
            logits,
            batch,
            want_entropies=want_entropies,
            temperature=self._context.estimate.policy_temperature,
        )

    def _slower_path(
        self, forward: ForwardResult, coefficients: Coefficients, microbatch: Microbatch, recorder: RowRecorder
    ) -> None:
        """Gradients of the parameters that are not captured: one backward for each that is wanted, over the same graph."""
        left = [(p.name, p.tensor) for p in self._context.registry.parameters if p.name not in self._modules.captured]
        if not left:
            return
        losses = [coefficients.losses(forward, column) for column in range(len(coefficients.columns))]
        for term in recorder.terms(microbatch.unit, len(losses)):
            members = term.members.to(coefficients.by_sequence.device)
            scale = power_of_two_scale(members * coefficients.largest(term.column))
            own = losses[term.column]
            torch.autograd.backward(((scale * members).to(own.dtype) * own).sum(), retain_graph=True)
            for name, parameter in left:
                if parameter.grad is not None:
                    recorder.put(name, term, parameter.grad / scale)
                    parameter.grad = None


class HiddenStatesWay(LogitsWay):
    """Log-probs from hidden states, without logits: for models whose output layer is a frozen linear map."""

    name: ClassVar[str] = "hidden states"

    def __str__(self) -> str:
        return "whole sequences, log-probs from hidden states without logits"

    def why_not(self, trial: Trial) -> str | None:
        """See `Way.why_not`."""
        trial.refuse_interaction()
        if trial.head is None:
            return "its decoder and output layer cannot be told apart"
        if trial.head.frozen is None:
            return "its output layer is trained, or no linear map"
        self._autocast = trial.autocast
        return skipped_modules_do_more(self._context) or trial.other_logits(trial.head)

    def _forward(self, microbatch: Microbatch, *, want_entropies: bool) -> ForwardResult:
        head = find_output_head(self._context.registry.module)
        layer: OutputLayer | None = None if head is None else head.frozen
        assert layer is not None
        batch = pad_rows(microbatch.rollouts, microbatch.rows, self._context.device)
        with self._autocast():
            forward = hidden_logprobs(
                layer,
                batch,
                want_entropies=want_entropies,
                temperature=self._context.estimate.policy_temperature,
            )
        if torch.is_grad_enabled():
            assert_attached("hidden states", forward.logits, type(self).__name__)
        return forward
