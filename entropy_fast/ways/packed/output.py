"""From hidden states of packed tokens to log-probs, coefficients and what goes back into them.

Legend: S_i sequence log-prob, s_t log-prob and H_t entropy of a token, h_t the hidden state that predicts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from entropy_fast.capture import RowRecorder
from entropy_fast.columns import Backward, Coefficients, ScoredTokens
from entropy_fast.context import ProbeContext
from entropy_fast.ops import linear_token_logprobs, linear_token_logprobs_with_units, token_logprobs
from entropy_fast.ways.packed.layout import PackedLayout
from entropy_fast.ways.teacher_forcing import OutputHead
from entropy_fast.ways.way import Microbatch, Passed

__all__ = ["Cotangent", "OutputSignals", "output_signals", "scores_of"]

# Scored tokens whose logits an output layer that has to be run by itself makes at a time: enough for a matrix product.
_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Cotangent:
    """What one backward puts into the hidden states.

    Attributes:
        backward: which columns it serves, and what the signals of every sequence are multiplied by for them.
        signal: [M, H] what goes back into h_t.
    """

    backward: Backward
    signal: Tensor


@dataclasses.dataclass(frozen=True)
class OutputSignals:
    """What the output layer says about one microbatch.

    Attributes:
        passed: log-probs and coefficients.
        cotangents: one a backward, to be gone through once.
        backwards: how many that are.
    """

    passed: Passed
    cotangents: Iterable[Cotangent]
    backwards: int


def output_signals(
    context: ProbeContext,
    head: OutputHead,
    hidden: Tensor,
    layout: PackedLayout,
    microbatch: Microbatch,
    recorder: RowRecorder,
) -> OutputSignals:
    """Log-probs, coefficients and what goes back; what an output layer is trained by goes to ``recorder``.

    Args:
        context: of the probe.
        head: the output layer.
        hidden: [M, H] detached hidden states that predict the scored tokens.
        layout: of the microbatch.
        microbatch: the sequences.
        recorder: told whose signals come while an output layer of another kind runs back.

    Raises:
        GraphDetachedError, RolloutsError: a log-prob is not finite.
    """
    layer, columns, temperature = head.frozen, microbatch.columns, context.estimate.policy_temperature
    if layer is None:
        return _through_own_head(head, hidden, layout, microbatch, recorder, temperature)
    layer = layer.at(temperature)
    found = linear_token_logprobs_with_units(
        hidden if temperature == 1 else hidden / temperature,
        layer.weight,
        layout.targets,
        bias=layer.bias,
        softcap=layer.softcap,
        want_entropy=columns.needs_entropies,
    )
    assert found.unit_logprob is not None
    scored = ScoredTokens(
        microbatch.rollouts, layout.rows, layout.by_sequence(found.logprob), found.logprob, found.entropy
    )
    coefficients = columns.weigh(scored)
    unit_logprob, unit_entropy = found.unit_logprob, found.unit_entropy
    if temperature != 1:
        # They are by h/T.
        unit_logprob = unit_logprob / temperature
        unit_entropy = None if unit_entropy is None else unit_entropy / temperature
    backwards = coefficients.backwards()
    # One at a time, so that none is held for later.
    cotangents = (Cotangent(backward, backward.signal(unit_logprob, unit_entropy)) for backward in backwards)
    return OutputSignals(Passed.of(scored, coefficients), cotangents, len(backwards))


def scores_of(
    context: ProbeContext, head: OutputHead, hidden: Tensor, layout: PackedLayout, microbatch: Microbatch
) -> ScoredTokens:
    """Log-probs and entropies alone, without a graph; arguments and errors as of `output_signals`."""
    layer, temperature = head.frozen, context.estimate.policy_temperature
    if layer is not None:
        scaled, layer = hidden if temperature == 1 else hidden / temperature, layer.at(temperature)
        found = linear_token_logprobs(
            scaled, layer.weight, layout.targets, bias=layer.bias, softcap=layer.softcap, want_entropy=True
        )
        logprobs, entropies = found.logprob, found.entropy
    else:
        parts = [
            token_logprobs(head.logits(hidden[own], temperature), layout.targets[own], want_entropy=True)
            for own, _ in _chunks(layout)
        ]
        logprobs = torch.cat([part.logprob for part in parts])
        entropies = torch.cat([part.entropy for part in parts if part.entropy is not None])
    return ScoredTokens(microbatch.rollouts, layout.rows, layout.by_sequence(logprobs), logprobs, entropies)


def _through_own_head(
    head: OutputHead,
    hidden: Tensor,
    layout: PackedLayout,
    microbatch: Microbatch,
    recorder: RowRecorder,
    temperature: float,
) -> OutputSignals:
    """As `output_signals`, by way of logits and their graph, some prompts at a time."""
    columns = microbatch.columns
    cotangents: list[list[Cotangent]] = [[] for _ in range(columns.backwards)]
    parts: list[Passed] = []
    for own, groups in _chunks(layout):
        leaf = hidden[own].requires_grad_()
        recorder.pause(leaf.shape[0])
        with torch.enable_grad():
            found = token_logprobs(
                head.logits(leaf, temperature), layout.targets[own], want_entropy=columns.needs_entropies
            )
        rows = slice(layout.groups[groups.start].rows[0], layout.groups[groups.stop - 1].rows[1])
        sequence = layout.scored_row[own]
        logprobs, entropies = found.logprob.detach(), None if found.entropy is None else found.entropy.detach()
        sums = layout.by_sequence(logprobs, own, rows)
        scored = ScoredTokens(microbatch.rollouts, layout.rows[rows], sums, logprobs, entropies)
        coefficients = columns.weigh(scored)
        backwards = coefficients.backwards()
        for number, backward in enumerate(backwards):
            recorder.expect_packed(_runs(layout, groups), backward.weights[:, sequence - rows.start], sequence)
            loss = backward.loss(found.logprob, found.entropy)
            torch.autograd.backward(loss, retain_graph=number < len(backwards) - 1)
            assert leaf.grad is not None
            cotangents[number].append(Cotangent(backward, leaf.grad))
            leaf.grad = None
        parts.append(Passed.of(scored, coefficients))
    recorder.pause()
    return OutputSignals(_joined_passed(parts), [_joined(found) for found in cotangents], len(cotangents))


def _joined(parts: Sequence[Cotangent]) -> Cotangent:
    """Of successive prompts; what coefficients of tokens were is in the signals already."""
    weights = torch.cat([part.backward.weights for part in parts], 1)
    backward = Backward(parts[0].backward.columns, weights, None, None)
    return Cotangent(backward, torch.cat([part.signal for part in parts]))


def _joined_passed(parts: Sequence[Passed]) -> Passed:
    return Passed(
        torch.cat([part.sequence_logprobs for part in parts]),
        Coefficients.joined([part.coefficients for part in parts]),
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
