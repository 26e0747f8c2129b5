"""One microbatch of packed sequences: its forwards, and the backwards that bring every unit's X and g.

Legend: S_i sequence log-prob, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, K_p and V_p keys and values of a
prompt, h_p its last hidden state, which predicts the first response token.

Prompts run forward and keep their graph. Responses continue from detached copies of K_p, V_p and h_p. One backward of Σ_i S_i
through the responses gives their signals and what every response sends back to its prompt; that is summed with c_i and with
a_i, and the two sums go back through the prompts' graph one after the other: what arrives there is already weighted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_fast.engines.capture import SignalRows
from entropy_fast.engines.coefficients import power_of_two_scale
from entropy_fast.engines.packed.exchange import PackedRun, attention_configurations, attention_exchanged
from entropy_fast.engines.packed.frozen_layers import FrozenLayers
from entropy_fast.engines.packed.layout import PackedGroup, PackedLayout, pack_microbatch
from entropy_fast.engines.packed.output import OutputSignals, output_signals, packed_logprobs, wanted_weights
from entropy_fast.guards.grad_context import assert_attached
from entropy_fast.probe_components import DETACHED_FIX, ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.teacher_forcing import OutputHead

__all__ = ["PackedPass"]


class PackedPass:
    """Packed microbatches of one model.

    Args:
        components: model and options.
        head: decoder and output layer.
        share: whether a prompt's tokens run once for all of its responses.
    """

    def __init__(self, components: ProbeComponents, head: OutputHead, *, share: bool) -> None:
        self._components = components
        self._head = head
        self._configurations = attention_configurations(head.decoder)
        self._frozen = FrozenLayers(head.decoder)
        self.share = share

    def of_whole_sequences(self) -> PackedPass:
        """The same pass in which nothing is shared."""
        return PackedPass(self._components, self._head, share=False) if self.share else self

    def logprobs(self, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """[M] log-probs of the scored tokens of the given rows, without a graph."""
        layout = self._layout(rollouts, rows, [0] * len(rows))
        run = PackedRun(layout, self._components.device)
        with torch.no_grad(), self._components.autocast(), self._exchanged(run):
            before, after = self._forward(layout, run, None)
            return packed_logprobs(self._head, _scored(layout, before, after), layout.targets)

    def run(
        self, rollouts: Rollouts, rows: Tensor, unit: list[int], gradients: SignalRows, labels: str
    ) -> OutputSignals:
        """Add one microbatch of whole prompts to ``gradients``.

        Args:
            rollouts: the batch.
            rows: [n] row indices, those of one prompt next to one another.
            unit: [n] unit of every row, rows of one unit next to one another.
            gradients: the recorder.
            labels: which of X and Y is wanted.

        Raises:
            GraphDetachedError: the hidden states have no graph, or a log-prob is NaN.
        """
        layout = self._layout(rollouts, rows, unit)
        run = PackedRun(layout, self._components.device)
        with self._exchanged(run):
            with self._components.autocast():
                before, after = self._forward(layout, run, gradients)
            attached = after if after.requires_grad or not before.requires_grad else before
            if self._head.frozen is not None:
                assert_attached("hidden states", attached, "PackedPass", DETACHED_FIX)
            hidden = _scored(layout, before.detach(), after.detach())
            signals = output_signals(self._components, self._head, hidden, layout, rollouts, gradients, labels)
            del hidden
            weights = wanted_weights(signals.coefficients, labels)
            run.weights.append(weights)
            self._backward_through_tails(layout, after, signals, weights, gradients)
            self._backward_through_prefixes(layout, run, before, signals, weights, gradients)
        gradients.pause()
        return signals

    @contextlib.contextmanager
    def _exchanged(self, run: PackedRun) -> Iterator[None]:
        """The decoder's attention is that of ``run``, and what is frozen and has a compiled twin runs compiled."""
        with attention_exchanged(self._configurations, run), self._frozen.exchanged():
            yield

    def _layout(self, rollouts: Rollouts, rows: Tensor, unit: list[int]) -> PackedLayout:
        return pack_microbatch(rollouts, rows, unit, self._components.device, share=self.share)

    def _forward(self, layout: PackedLayout, run: PackedRun, gradients: SignalRows | None) -> tuple[Tensor, Tensor]:
        """[1, P, H] and [1, Q, H] hidden states of the prefixes and the tails."""
        states = []
        for run.on_tails, ids, positions in (
            (False, layout.prefix_ids, layout.prefix_positions),
            (True, layout.tail_ids, layout.tail_positions),
        ):
            if gradients is not None:
                gradients.pause(ids.shape[1])
            states.append(self._decode(ids, positions) if ids.shape[1] else None)
        found = next(state for state in states if state is not None)
        before, after = (found.new_zeros(1, 0, found.shape[-1]) if state is None else state for state in states)
        return before, after

    def _decode(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._head.decoder(input_ids=ids, position_ids=positions, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _backward_through_tails(
        self, layout: PackedLayout, after: Tensor, signals: OutputSignals, weights: Tensor, gradients: SignalRows
    ) -> None:
        if not after.requires_grad:
            return
        by_tail = layout.source < after.shape[1]
        above = torch.zeros_like(after)
        above[0, layout.source[by_tail]] = signals.unit_gradients[by_tail].to(after.dtype)
        sequence = None if self.share else layout.tail_row
        gradients.expect_packed(_runs(layout.groups, tails=True), weights[:, layout.tail_row], sequence)
        torch.autograd.backward(after, above)

    def _backward_through_prefixes(
        self,
        layout: PackedLayout,
        run: PackedRun,
        before: Tensor,
        signals: OutputSignals,
        weights: Tensor,
        gradients: SignalRows,
    ) -> None:
        run.on_tails = False
        labels = [label for label in range(2) if bool((weights[label] != 0).any())]
        # What goes through the graph is of ordinary size; the sums get it back scaled.
        scales = torch.ones(2, before.shape[1], dtype=torch.float64, device=before.device)
        for group in layout.groups:
            for label in labels:
                scales[label, slice(*group.prefix)] = power_of_two_scale(weights[label, slice(*group.rows)])
        states = [state for state in run.states.values() if state.cotangents is not None]
        for label in labels:
            pairs = []
            for state in states:
                assert state.cotangents is not None
                for tensor, cotangent in zip((state.key, state.value), state.cotangents, strict=True):
                    if tensor.requires_grad:
                        scaled = cotangent[label] * scales[label, :, None].to(cotangent.dtype)
                        pairs.append((tensor, scaled.unsqueeze(0).to(tensor.dtype)))
            if before.requires_grad:
                pairs.append((before, _above_prefixes(layout, before, signals, weights[label], scales[label])))
            if not pairs:
                return
            inverse = torch.zeros_like(scales)
            inverse[label] = 1.0 / scales[label]
            gradients.expect_packed(_runs(layout.groups, tails=False), inverse)
            torch.autograd.backward(
                [tensor for tensor, _ in pairs], [above for _, above in pairs], retain_graph=label != labels[-1]
            )


def _last(layout: PackedLayout, device: torch.device) -> Tensor:
    """[groups] place of every prefix's last token; anything where it is empty."""
    return torch.tensor([max(end - 1, 0) for _, end in (g.prefix for g in layout.groups)], device=device)


def _scored(layout: PackedLayout, before: Tensor, after: Tensor) -> Tensor:
    """[M, H] hidden states that predict the scored tokens."""
    if not before.shape[1]:
        return after[0].index_select(0, layout.source)
    last = before[0].index_select(0, _last(layout, before.device))
    return torch.cat([after[0], last]).index_select(0, layout.source)


def _above_prefixes(
    layout: PackedLayout, before: Tensor, signals: OutputSignals, weights: Tensor, scales: Tensor
) -> Tensor:
    """[1, P, H] Σ_i of a coefficient and ∂S_i/∂h_p, scaled, at the last token of every prefix."""
    n_tail = layout.tail_ids.shape[1]
    by_prefix = layout.source >= n_tail
    units = signals.unit_gradients[by_prefix]
    last = _last(layout, before.device)
    member = torch.nn.functional.one_hot(layout.source[by_prefix] - n_tail, len(layout.groups)).to(units.dtype)
    factor = (weights[layout.scored_row[by_prefix]] * scales[last[layout.source[by_prefix] - n_tail]]).to(units.dtype)
    above = torch.zeros_like(before)
    used = torch.tensor([g.prefix[1] > g.prefix[0] for g in layout.groups], device=before.device)
    above[0, last[used]] = (member.t() @ (units * factor[:, None]))[used].to(before.dtype)
    return above


def _runs(groups: tuple[PackedGroup, ...], *, tails: bool) -> list[tuple[int, int, int]]:
    """Unit, first and last token of every group."""
    return [(group.unit, *(group.tail_span if tails else group.prefix)) for group in groups]
