"""From hidden states of packed tokens to log-probs, sequence coefficients and the gradient that goes back into them.

Legend: S_i sequence log-prob, s_t log-prob of a token, h_t the hidden state that predicts it, c_i and a_i coefficients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_fast.engines.capture import SignalRows
from entropy_fast.engines.coefficients import Coefficients, length_weights, sequence_coefficients
from entropy_fast.engines.packed.layout import PackedLayout
from entropy_fast.ops import linear_token_logprobs_with_units, token_logprobs
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.teacher_forcing.forward import refuse_nan
from entropy_fast.teacher_forcing.output_layer import OutputHead

__all__ = ["OutputSignals", "output_signals", "packed_logprobs", "wanted_weights"]

# Scored tokens whose logits an output layer that has to be run by itself makes at a time: enough for a matrix product.
_ROWS = 512


@dataclasses.dataclass(frozen=True)
class OutputSignals:
    """What the output layer says about one microbatch.

    Attributes:
        sequence_logprobs: [n] S_i, nats.
        coefficients: c and a of its sequences.
        unit_gradients: [M, H] ∂s_t/∂h_t.
    """

    sequence_logprobs: Tensor
    coefficients: Coefficients
    unit_gradients: Tensor


def packed_logprobs(head: OutputHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """[M] log-probs of ``targets`` [M] by way of logits, from their hidden states [M, H]; with their graph."""
    logits = head.module(hidden[None])[0]
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return token_logprobs(logits, targets).logprob


def output_signals(
    components: ProbeComponents,
    head: OutputHead,
    hidden: Tensor,
    layout: PackedLayout,
    rollouts: Rollouts,
    gradients: SignalRows,
    labels: str,
) -> OutputSignals:
    """Log-probs, coefficients and unit gradients; what an output layer is trained by goes to ``gradients``.

    Args:
        components: model and options.
        head: the output layer.
        hidden: [M, H] detached hidden states that predict the scored tokens.
        layout: of the microbatch.
        rollouts: the batch.
        gradients: the recorder.
        labels: which of X and Y is wanted.

    Raises:
        GraphDetachedError: a log-prob is NaN.
    """
    weights = length_weights(rollouts, components.config.weighting)
    if head.frozen is not None:
        layer = head.frozen
        with components.autocast():
            found = linear_token_logprobs_with_units(
                hidden, layer.weight, layout.targets, bias=layer.bias, softcap=layer.softcap
            )
        refuse_nan(found.logprob)
        assert found.unit_logprob is not None
        sums = layout.by_sequence(found.logprob)
        return OutputSignals(sums, sequence_coefficients(sums, layout.rows, rollouts, weights), found.unit_logprob)
    units = torch.empty_like(hidden)
    parts = []
    for own, groups in _chunks(layout):
        leaf = hidden[own].requires_grad_()
        gradients.pause(leaf.shape[0])
        with torch.enable_grad(), components.autocast():
            logprobs = packed_logprobs(head, leaf, layout.targets[own])
        refuse_nan(logprobs)
        rows = slice(layout.groups[groups.start].rows[0], layout.groups[groups.stop - 1].rows[1])
        sequence = layout.scored_row[own]
        row = sequence - rows.start
        sums = layout.by_sequence(logprobs.detach(), own, rows)
        coefficients = sequence_coefficients(sums, layout.rows[rows], rollouts, weights)
        gradients.expect_packed(_runs(layout, groups), wanted_weights(coefficients, labels)[:, row], sequence)
        torch.autograd.backward(logprobs.sum())
        assert leaf.grad is not None
        units[own] = leaf.grad
        parts.append((sums, coefficients))
    gradients.pause()
    return OutputSignals(
        torch.cat([sums for sums, _ in parts]),
        Coefficients(torch.cat([c.entropy for _, c in parts]), torch.cat([c.update for _, c in parts])),
        units,
    )


def wanted_weights(coefficients: Coefficients, labels: str) -> Tensor:
    """[2, n] c and a, zero where X or Y is not wanted."""
    return torch.stack(
        [
            values if label in labels else torch.zeros_like(values)
            for label, values in (("X", coefficients.entropy), ("Y", coefficients.update))
        ]
    )


def _chunks(layout: PackedLayout) -> Iterator[tuple[slice, slice]]:
    """Scored tokens and groups of successive stretches of whole prompts, of about `_ROWS` scored tokens."""
    begin = first = 0
    for number, end in enumerate(layout.scored_ends):
        if end - begin >= _ROWS or number == len(layout.groups) - 1:
            yield slice(begin, end), slice(first, number + 1)
            begin, first = end, number + 1


def _runs(layout: PackedLayout, groups: slice) -> list[tuple[int, int, int]]:
    begin = layout.scored_ends[groups.start - 1] if groups.start else 0
    runs, at = [], 0
    for number in range(groups.start, groups.stop):
        size = layout.scored_ends[number] - begin - at
        runs.append((layout.groups[number].unit, at, at + size))
        at += size
    return runs
