"""From hidden states of packed tokens to log-probs, sequence coefficients and the gradient that goes back into them.

Legend: S_i sequence log-prob, s_t log-prob of a token, h_t the hidden state that predicts it, c_i and a_i coefficients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from entropy_fast.capture import SignalRows
from entropy_fast.columns.coefficients import Coefficients
from entropy_fast.columns.token_coefficients import ScoredTokens, coefficients_of
from entropy_fast.ops import TokenLogprobs, linear_token_logprobs_with_units, token_logprobs
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.packed.cotangents import Cotangent, of_units, token_weights
from entropy_fast.ways.packed.layout import PackedLayout
from entropy_fast.ways.padded.forward import refuse_nan
from entropy_fast.ways.padded.output_layer import OutputHead

__all__ = ["OutputSignals", "head_logprobs", "output_signals"]

# Scored tokens whose logits an output layer that has to be run by itself makes at a time: enough for a matrix product.
_ROWS = 512


@dataclasses.dataclass(frozen=True)
class OutputSignals:
    """What the output layer says about one microbatch.

    Attributes:
        sequence_logprobs: [n] S_i, nats.
        coefficients: c and a of its sequences.
        cotangents: the backwards it takes, to be gone through once.
        backwards: how many that are.
    """

    sequence_logprobs: Tensor
    coefficients: Coefficients
    cotangents: Iterable[Cotangent]
    backwards: int


def head_logprobs(head: OutputHead, hidden: Tensor, targets: Tensor, *, want_entropies: bool = False) -> TokenLogprobs:
    """Of ``targets`` [M] by way of logits, from their hidden states [M, H]; with their graph."""
    logits = head.module(hidden[None])[0]
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return token_logprobs(logits, targets, want_entropy=want_entropies)


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
    if head.frozen is None:
        return _through_own_head(components, head, hidden, layout, rollouts, gradients, labels)
    config, layer = components.config, head.frozen
    with components.autocast():
        found = linear_token_logprobs_with_units(
            hidden,
            layer.weight,
            layout.targets,
            bias=layer.bias,
            softcap=layer.softcap,
            want_entropy=config.wants_token_entropies_for(labels),
        )
    refuse_nan(found.logprob)
    assert found.unit_logprob is not None
    sums = layout.by_sequence(found.logprob)
    scored = ScoredTokens(sums, found.logprob, found.entropy)
    coefficients = coefficients_of(config, rollouts, layout.rows, scored, labels)
    cotangents = of_units(coefficients, labels, found.unit_logprob, found.unit_entropy)
    return OutputSignals(sums, coefficients, cotangents, len(labels) if coefficients.tokens is not None else 1)


def _through_own_head(
    components: ProbeComponents,
    head: OutputHead,
    hidden: Tensor,
    layout: PackedLayout,
    rollouts: Rollouts,
    gradients: SignalRows,
    labels: str,
) -> OutputSignals:
    """As `output_signals`, by way of logits and their graph, some prompts at a time."""
    config = components.config
    want_entropies = config.wants_token_entropies_for(labels)
    cotangents: list[list[Cotangent]] = []
    parts = []
    for own, groups in _chunks(layout):
        leaf = hidden[own].requires_grad_()
        gradients.pause(leaf.shape[0])
        with torch.enable_grad(), components.autocast():
            found = head_logprobs(head, leaf, layout.targets[own], want_entropies=want_entropies)
        refuse_nan(found.logprob)
        rows = slice(layout.groups[groups.start].rows[0], layout.groups[groups.stop - 1].rows[1])
        sequence = layout.scored_row[own]
        sums = layout.by_sequence(found.logprob.detach(), own, rows)
        scored = ScoredTokens(sums, found.logprob, found.entropy)
        coefficients = coefficients_of(config, rollouts, layout.rows[rows], scored, labels)
        losses = list(_losses(found, coefficients, labels))
        for number, (loss, weights, label) in enumerate(losses):
            gradients.expect_packed(_runs(layout, groups), weights[:, sequence - rows.start], sequence)
            torch.autograd.backward(loss, retain_graph=number < len(losses) - 1)
            assert leaf.grad is not None
            if number == len(cotangents):
                cotangents.append([])
            cotangents[number].append(Cotangent(leaf.grad, weights, label))
            leaf.grad = None
        parts.append((sums, coefficients))
    gradients.pause()
    return OutputSignals(
        torch.cat([sums for sums, _ in parts]),
        Coefficients.joined([coefficients for _, coefficients in parts]),
        [_joined(found) for found in cotangents],
        len(cotangents),
    )


def _losses(
    found: TokenLogprobs, coefficients: Coefficients, labels: str
) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """What is differentiated, and weights and label as a `Cotangent` has them."""
    if coefficients.tokens is None:
        yield found.logprob.sum(), coefficients.rows(labels), None
        return
    for own in token_weights(coefficients, labels):
        loss = (own.of_logprob.to(found.logprob.dtype) * found.logprob).sum()
        if own.of_entropy is not None:
            assert found.entropy is not None
            loss = loss + (own.of_entropy.to(found.entropy.dtype) * found.entropy).sum()
        yield loss, own.inverse, own.label


def _joined(parts: Sequence[Cotangent]) -> Cotangent:
    """Of successive prompts."""
    return Cotangent(
        torch.cat([part.gradients for part in parts]), torch.cat([part.weights for part in parts], 1), parts[0].label
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
