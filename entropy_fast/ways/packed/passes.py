"""One microbatch of packed sequences: its forwards, and the backwards that bring every unit's X and g.

Legend: S_i sequence log-prob, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i, K_p and V_p keys and values of a
prompt, h_p its last hidden state, which predicts the first response token.

A response sends back to its prompt what has to be summed with c_i and with a_i: two cotangents, already weighted, go through
the prompt's tokens. There are two ways to that:

- in one row: the prompts stand behind the responses, once for each of the two, and responses continue from the first copy. One
  forward and one backward. Where coefficients differ within a sequence, X and g take a backward each (`cotangents`), and the
  prompts stand in the row once, for both in turn.
- apart: prompts run forward and keep their graph. Responses continue from detached copies of K_p, V_p and h_p; after the
  backward through the responses the two sums go back through the prompts' graph one after the other. No token runs
  forward twice, at the cost of one more forward and two more backwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_fast.capture import SignalRows
from entropy_fast.checks.grad_context import assert_attached
from entropy_fast.columns.coefficients import power_of_two_scale
from entropy_fast.probe_components import DETACHED_FIX, ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.packed.cotangents import Cotangent
from entropy_fast.ways.packed.exchange import PackedRun, attention_configurations, attention_exchanged
from entropy_fast.ways.packed.frozen_layers import FrozenLayers
from entropy_fast.ways.packed.layout import PackedGroup, PackedLayout, pack_microbatch
from entropy_fast.ways.packed.output import OutputSignals, head_logprobs, output_signals
from entropy_fast.ways.padded import OutputHead

__all__ = ["PackedPass"]

# Tokens of prefixes up to which running them forward twice costs less than a forward and backwards of their own.
_MOST_COPIED = 1024


class PackedPass:
    """Packed microbatches of one model.

    Args:
        components: model and options.
        head: decoder and output layer.
        share: whether a prompt's tokens run once for all of its responses.

    Attributes:
        share: the same.
        prompt_forwards: how often a prompt's tokens ran forward in one microbatch at most.
    """

    def __init__(self, components: ProbeComponents, head: OutputHead, *, share: bool) -> None:
        self._components = components
        self._head = head
        self._configurations = attention_configurations(head.decoder)
        self._frozen = FrozenLayers(head.decoder)
        self.share = share
        self.prompt_forwards = 1

    def of_whole_sequences(self) -> PackedPass:
        """The same pass in which nothing is shared."""
        if not self.share:
            return self
        other = copy.copy(self)
        other.share = False
        return other

    def logprobs(self, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """[M] log-probs of the scored tokens of the given rows, without a graph."""
        layout = self._layout(rollouts, rows, [0] * len(rows))
        run = PackedRun(layout, self._components.device, copies=self._copies(layout, "X"))
        with torch.no_grad(), self._components.autocast(), self._exchanged(run):
            before, after = self._forward(layout, run, None)[:2]
            return head_logprobs(self._head, _scored(layout, before, after), layout.targets).logprob

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
        run = PackedRun(layout, self._components.device, copies=self._copies(layout, labels))
        self.prompt_forwards = max(self.prompt_forwards, len(run.copies))
        with self._exchanged(run):
            with self._components.autocast():
                before, after, whole = self._forward(layout, run, gradients)
            attached = after if after.requires_grad or not before.requires_grad else before
            if self._head.frozen is not None:
                assert_attached("hidden states", attached, "PackedPass", DETACHED_FIX)
            hidden = _scored(layout, before.detach(), after.detach())
            signals = output_signals(self._components, self._head, hidden, layout, rollouts, gradients, labels)
            del hidden
            left = signals.backwards
            for cotangent in signals.cotangents:
                left -= 1
                more = left > 0
                if whole is not None:
                    self._backward_through_row(layout, run, whole, cotangent, gradients, more=more)
                else:
                    self._backward_through_tails(layout, run, after, cotangent, gradients, more=more)
                    self._backward_through_prefixes(layout, run, before, cotangent, gradients, more=more)
                # The next is not made while this one is held.
                del cotangent
        gradients.pause()
        return signals

    @contextlib.contextmanager
    def _exchanged(self, run: PackedRun) -> Iterator[None]:
        """The decoder's attention is that of ``run``, and what is frozen and has a compiled twin runs compiled."""
        with attention_exchanged(self._configurations, run), self._frozen.exchanged():
            yield

    def _layout(self, rollouts: Rollouts, rows: Tensor, unit: list[int]) -> PackedLayout:
        return pack_microbatch(rollouts, rows, unit, self._components.device, share=self.share)

    def _copies(self, layout: PackedLayout, labels: str) -> tuple[int, ...]:
        """Labels for each of which the prefixes stand in the row of the tails; none where they are to run apart."""
        wanted = tuple(label for label, name in enumerate("XY") if name in labels)
        n_prefix, n_tail = layout.prefix_ids.shape[1], layout.tail_ids.shape[1]
        if self._components.config.coefficients_by_token:
            # A backward for each label: one copy serves both, one after the other.
            wanted = wanted[:1]
        if not n_prefix or not n_tail or (len(wanted) > 1 and n_prefix > _MOST_COPIED):
            return ()
        return wanted

    def _forward(
        self, layout: PackedLayout, run: PackedRun, gradients: SignalRows | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[1, P, H] and [1, Q, H] hidden states of the prefixes and the tails, and [1, N, H] those of their one row."""
        n_prefix, n_tail, n_copies = layout.prefix_ids.shape[1], layout.tail_ids.shape[1], len(run.copies)
        if n_copies:
            run.on_tails = True
            ids = torch.cat([layout.tail_ids, *[layout.prefix_ids] * n_copies], 1)
            positions = torch.cat([layout.tail_positions, *[layout.prefix_positions] * n_copies], 1)
            whole = self._decode(ids, positions, gradients)
            return whole[:, n_tail : n_tail + n_prefix], whole[:, :n_tail], whole
        states = []
        for run.on_tails, ids, positions in (
            (False, layout.prefix_ids, layout.prefix_positions),
            (True, layout.tail_ids, layout.tail_positions),
        ):
            states.append(self._decode(ids, positions, gradients) if ids.shape[1] else None)
        found = next(state for state in states if state is not None)
        before, after = (found.new_zeros(1, 0, found.shape[-1]) if state is None else state for state in states)
        return before, after, None

    def _decode(self, ids: Tensor, positions: Tensor, gradients: SignalRows | None) -> Tensor:
        if gradients is not None:
            gradients.pause(ids.shape[1])
        output = self._head.decoder(input_ids=ids, position_ids=positions, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _backward_through_row(
        self,
        layout: PackedLayout,
        run: PackedRun,
        whole: Tensor,
        cotangent: Cotangent,
        gradients: SignalRows,
        *,
        more: bool,
    ) -> None:
        """One backward of tails and copies of prefixes; a copy's signals come weighted, and scaled by its scales."""
        if not whole.requires_grad:
            return
        weights, n_tail = cotangent.weights, layout.tail_ids.shape[1]
        scales = _prefix_scales(layout, weights)
        copies = run.copies if cotangent.label is None else (cotangent.label,)
        # Attention knows the copy by the label that the forward gave it.
        order = [0, 1] if copies[0] == run.copies[0] else [1, 0]
        run.weights[:] = weights[order], scales[order]
        above = torch.zeros_like(whole)
        _put_above_tails(layout, above, cotangent)
        of_tokens = weights.new_zeros(2, whole.shape[1])
        of_tokens[:, :n_tail] = weights[:, layout.tail_row]
        runs = _runs(layout.groups, tails=True)
        for place, label in enumerate(copies):
            copied = run.copy(place)
            above[:, copied] = _above_prefixes(layout, whole[:, copied], cotangent, label, scales[label])
            if bool((weights[label] != 0).any()):
                of_tokens[label, copied] = 1.0 / scales[label]
            begin = copied.start
            runs += [(unit, begin + first, begin + last) for unit, first, last in _runs(layout.groups, tails=False)]
        gradients.expect_packed(runs, of_tokens)
        torch.autograd.backward(whole, above, retain_graph=more)

    def _backward_through_tails(
        self,
        layout: PackedLayout,
        run: PackedRun,
        after: Tensor,
        cotangent: Cotangent,
        gradients: SignalRows,
        *,
        more: bool,
    ) -> None:
        run.on_tails = True
        run.weights[:] = (cotangent.weights,)
        if not after.requires_grad:
            return
        above = torch.zeros_like(after)
        _put_above_tails(layout, above, cotangent)
        sequence = None if self.share else layout.tail_row
        gradients.expect_packed(_runs(layout.groups, tails=True), cotangent.weights[:, layout.tail_row], sequence)
        torch.autograd.backward(after, above, retain_graph=more)

    def _backward_through_prefixes(
        self,
        layout: PackedLayout,
        run: PackedRun,
        before: Tensor,
        cotangent: Cotangent,
        gradients: SignalRows,
        *,
        more: bool,
    ) -> None:
        run.on_tails = False
        weights = cotangent.weights
        labels = [label for label in range(2) if bool((weights[label] != 0).any())]
        scales = _prefix_scales(layout, weights)
        states = [(state, sums) for state in run.states.values() if (sums := state.take_sums()) is not None]
        for label in labels:
            pairs = []
            for state, sums in states:
                for tensor, summed in zip((state.key, state.value), sums, strict=True):
                    if tensor.requires_grad:
                        scaled = summed[label] * scales[label, :, None].to(summed.dtype)
                        pairs.append((tensor, scaled.unsqueeze(0).to(tensor.dtype)))
            if before.requires_grad:
                pairs.append((before, _above_prefixes(layout, before, cotangent, label, scales[label])))
            if not pairs:
                return
            inverse = torch.zeros_like(scales)
            inverse[label] = 1.0 / scales[label]
            gradients.expect_packed(_runs(layout.groups, tails=False), inverse)
            torch.autograd.backward(
                [tensor for tensor, _ in pairs], [above for _, above in pairs], retain_graph=more or label != labels[-1]
            )


def _put_above_tails(layout: PackedLayout, above: Tensor, cotangent: Cotangent) -> None:
    """What goes back at the tail tokens that predict another one, into ``above`` [1, Q or more, H]."""
    by_tail = layout.source < layout.tail_ids.shape[1]
    above[0, layout.source[by_tail]] = cotangent.gradients[by_tail].to(above.dtype)


def _prefix_scales(layout: PackedLayout, weights: Tensor) -> Tensor:
    """[2, P] what goes through a prefix's graph is multiplied by to be of ordinary size; the sums are divided by it."""
    scales = torch.ones(2, layout.prefix_ids.shape[1], dtype=torch.float64, device=weights.device)
    for group in layout.groups:
        for label in range(2):
            of_group = weights[label, slice(*group.rows)]
            if bool((of_group != 0).any()):
                scales[label, slice(*group.prefix)] = power_of_two_scale(of_group)
    return scales


def _last(layout: PackedLayout, device: torch.device) -> Tensor:
    """[groups] place of every prefix's last token; anything where it is empty."""
    return torch.tensor([max(end - 1, 0) for _, end in (g.prefix for g in layout.groups)], device=device)


def _scored(layout: PackedLayout, before: Tensor, after: Tensor) -> Tensor:
    """[M, H] hidden states that predict the scored tokens."""
    if not before.shape[1]:
        return after[0].index_select(0, layout.source)
    last = before[0].index_select(0, _last(layout, before.device))
    return torch.cat([after[0], last]).index_select(0, layout.source)


def _above_prefixes(layout: PackedLayout, before: Tensor, cotangent: Cotangent, label: int, scales: Tensor) -> Tensor:
    """[1, P, H] what goes back at the last token of every prefix: its responses' parts, summed with weights, and scaled."""
    weights = cotangent.weights[label]
    n_tail = layout.tail_ids.shape[1]
    by_prefix = layout.source >= n_tail
    units = cotangent.gradients[by_prefix]
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
