"""The packed way: forwards of packed sequences, and the backwards that bring every unit's gradient in every column.

Legend: S_i sequence log-prob, w_ci the coefficient of sequence i in column c, K_p and V_p keys and values of a prompt, h_p its
last hidden state, which predicts the first response token.

A response sends back to its prompt what has to be summed with the coefficients of every column: as many cotangents, already
weighted, go through the prompt's tokens. There are two ways to that:

- in one row: the prompts stand behind the responses, once for every column that a backward serves, and responses continue from
  the first copy. One forward and one backward. A column whose coefficients differ within a sequence takes a backward of its
  own, and uses the first copy.
- apart: prompts run forward and keep their graph. Responses continue from detached copies of K_p, V_p and h_p; after the
  backward through the responses the sums go back through the prompts' graph one after the other. No token runs forward twice,
  at the cost of one more forward and as many more backwards as there are columns.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from entropy_fast.capture import CapturedModules, RowRecorder
from entropy_fast.checks.grad_context import assert_attached
from entropy_fast.checks.memory import out_of_memory
from entropy_fast.checks.model_state import reentrant_checkpointing
from entropy_fast.columns import ScoredTokens
from entropy_fast.columns.coefficients import power_of_two_scale
from entropy_fast.context import ProbeContext
from entropy_fast.errors import EntropyFastError
from entropy_fast.libraries import attention_configurations, attention_function
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.packed.exchange import PackedRun
from entropy_fast.ways.packed.frozen_layers import FrozenLayers
from entropy_fast.ways.packed.layout import PackedGroup, PackedLayout, pack_microbatch
from entropy_fast.ways.packed.output import Cotangent, output_signals, scores_of
from entropy_fast.ways.teacher_forcing import OutputHead, find_output_head
from entropy_fast.ways.trial import Trial, skipped_modules_do_more
from entropy_fast.ways.way import Microbatch, Passed

__all__ = ["PackedWay"]

# Tokens of prefixes, in copies beyond the first, up to which running them forward again costs less than a forward and backwards
# of their own.
_MOST_COPIED = 1024
# What a decoder may raise that does not work on packed tokens. Everything else is no matter of packing.
_DOES_NOT_FIT = (NotImplementedError, AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError)

Attention = Callable[..., Any]


class PackedWay:
    """Packed microbatches of one model.

    Args:
        context: of the probe.
        modules: whose parameters are captured.
    """

    name: ClassVar[str] = "packed"
    packs: ClassVar[bool] = True

    def __init__(self, context: ProbeContext, modules: CapturedModules) -> None:
        self._context, self._modules = context, modules
        self._found = find_output_head(context.registry.module)
        self._autocast: Callable[[], contextlib.AbstractContextManager[object]] = context.autocast
        # A reentrant checkpoint cannot be gone through by two backwards of parts of its inputs.
        self.shares = reentrant_checkpointing(context.model) is None
        self.prompt_forwards = 1

    @property
    def _head(self) -> OutputHead:
        assert self._found is not None
        return self._found

    @property
    def weighs_whole(self) -> bool:
        """See `Way.weighs_whole`: an output layer that runs by itself does so some prompts at a time."""
        return self._head.frozen is not None

    @cached_property
    def _configurations(self) -> list[Any]:
        return attention_configurations(self._head.decoder)

    @cached_property
    def _frozen(self) -> FrozenLayers:
        return FrozenLayers(self._head.decoder)

    def __str__(self) -> str:
        what = "prompts' tokens shared by their responses" if self.shares else "whole sequences"
        return f"packed without padding, {what}"

    def why_not(self, trial: Trial) -> str | None:
        """See `Way.why_not`."""
        left = [name for name in self._context.registry.names if name not in self._modules.captured]
        if left:
            return f"parameter '{left[0]}' is not captured, and takes backwards of its own"
        if self._found is None or (reason := skipped_modules_do_more(self._context)) is not None:
            return reason if self._found is not None else "its decoder and output layer cannot be told apart"
        config = getattr(self._head.decoder, "config", None)
        if frequencies_depend_on_length(config):
            return "its rotary frequencies depend on the length of a forward's input"
        if (reason := trial.other_logits(self._head)) is not None:
            return reason
        self._autocast = trial.autocast
        called: set[int] = set()
        try:
            hidden = self.hidden(trial.rollouts, trial.rows, called)
        except EntropyFastError:
            raise
        except _DOES_NOT_FIT as error:
            if out_of_memory(error):
                raise
            said = (str(error).splitlines() or ["no message"])[0]
            return f"its decoder does not take packed tokens ({type(error).__name__}: {said})"
        layers = getattr(config, "num_hidden_layers", None)
        if layers is not None and len(called) != layers:
            return (
                f"{len(called)} of its {layers} layers ask transformers' attention interface for their attention; the others "
                "go another way"
            )
        return trial.other_hidden(hidden)

    def hidden(self, rollouts: Rollouts, rows: Tensor, called: set[int] | None = None) -> Tensor:
        """[M, H] hidden states that predict the scored tokens of the given rows, without a graph.

        Args:
            rollouts: the batch.
            rows: [n] row indices, those of one prompt next to one another.
            called: takes the ids of the layers that asked for the exchanged attention.
        """
        return self._hidden(self._layout(Microbatch(rollouts, rows, [0] * len(rows), self._context.columns)), called)

    def score(self, microbatch: Microbatch) -> ScoredTokens:
        """See `Way.score`."""
        layout = self._layout(microbatch)
        hidden = self._hidden(layout)
        with torch.no_grad(), self._autocast():
            return scores_of(self._context, self._head, hidden, layout, microbatch)

    def _hidden(self, layout: PackedLayout, called: set[int] | None = None) -> Tensor:
        """See `hidden`."""
        run = PackedRun(layout, self._context.device, copies=self._copies(layout, 1))

        def noted(module: nn.Module, *arguments: Any, **options: Any) -> Any:
            if called is not None:
                called.add(id(module))
            return run.attention(module, *arguments, **options)

        with torch.no_grad(), self._autocast(), self._exchanged(noted):
            before, after = self._forward(layout, run, None)[:2]
            return _scored(layout, before, after)

    def run(self, microbatch: Microbatch, recorder: RowRecorder) -> Passed:
        """See `Way.run`."""
        if recorder.whole_sequences and self.shares:
            apart = copy.copy(self)
            apart.shares = False
            return apart.run(microbatch, recorder)
        layout = self._layout(microbatch)
        run = PackedRun(layout, self._context.device, copies=self._copies(layout, microbatch.columns.most_at_once))
        self.prompt_forwards = max(self.prompt_forwards, len(run.copies))
        with self._exchanged(run.attention):
            with self._autocast():
                before, after, whole = self._forward(layout, run, recorder)
            attached = after if after.requires_grad or not before.requires_grad else before
            if self._head.frozen is not None:
                assert_attached("hidden states", attached, "PackedWay")
            hidden = _scored(layout, before.detach(), after.detach())
            with self._autocast():
                signals = output_signals(self._context, self._head, hidden, layout, microbatch, recorder)
            del hidden
            left = signals.backwards
            for cotangent in signals.cotangents:
                left -= 1
                if whole is not None:
                    self._backward_through_row(layout, run, whole, cotangent, recorder, more=left > 0)
                else:
                    self._backward_through_tails(layout, run, after, cotangent, recorder, more=left > 0)
                    self._backward_through_prefixes(layout, run, before, cotangent, recorder, more=left > 0)
                # The next is not made while this one is held.
                del cotangent
        recorder.pause()
        return signals.passed

    @contextlib.contextmanager
    def _exchanged(self, attention: Attention) -> Iterator[None]:
        """The decoder's attention is ``attention``, and what is frozen and has a compiled twin runs compiled."""
        with attention_function(self._configurations, attention), self._frozen.exchanged():
            yield

    def _layout(self, microbatch: Microbatch) -> PackedLayout:
        rollouts, rows, unit = microbatch.rollouts, microbatch.rows, microbatch.unit
        return pack_microbatch(rollouts, rows, unit, self._context.device, share=self.shares)

    def _copies(self, layout: PackedLayout, columns: int) -> tuple[int, ...]:
        """A number for every copy of the prefixes in the row of the tails, for backwards of at most so many columns.

        None where prefixes are to run apart.
        """
        n_prefix, n_tail = layout.prefix_ids.shape[1], layout.tail_ids.shape[1]
        if not n_prefix or not n_tail or (columns - 1) * n_prefix > _MOST_COPIED:
            return ()
        return tuple(range(columns))

    def _forward(
        self, layout: PackedLayout, run: PackedRun, recorder: RowRecorder | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[1, P, H] and [1, Q, H] hidden states of the prefixes and the tails, and [1, N, H] those of their one row."""
        n_prefix, n_tail, n_copies = layout.prefix_ids.shape[1], layout.tail_ids.shape[1], len(run.copies)
        if n_copies:
            run.on_tails = True
            ids = torch.cat([layout.tail_ids, *[layout.prefix_ids] * n_copies], 1)
            positions = torch.cat([layout.tail_positions, *[layout.prefix_positions] * n_copies], 1)
            whole = self._decode(ids, positions, recorder)
            return whole[:, n_tail : n_tail + n_prefix], whole[:, :n_tail], whole
        states = []
        for run.on_tails, ids, positions in (
            (False, layout.prefix_ids, layout.prefix_positions),
            (True, layout.tail_ids, layout.tail_positions),
        ):
            states.append(self._decode(ids, positions, recorder) if ids.shape[1] else None)
        found = next(state for state in states if state is not None)
        before, after = (found.new_zeros(1, 0, found.shape[-1]) if state is None else state for state in states)
        return before, after, None

    def _decode(self, ids: Tensor, positions: Tensor, recorder: RowRecorder | None) -> Tensor:
        if recorder is not None:
            recorder.pause(ids.shape[1])
        output = self._head.decoder(input_ids=ids, position_ids=positions, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _backward_through_row(
        self,
        layout: PackedLayout,
        run: PackedRun,
        whole: Tensor,
        cotangent: Cotangent,
        recorder: RowRecorder,
        *,
        more: bool,
    ) -> None:
        """One backward of tails and copies of prefixes; a copy's signals come weighted, and scaled by its scales."""
        if not whole.requires_grad:
            return
        weights, columns = cotangent.backward.weights, cotangent.backward.columns
        n_tail, scales = layout.tail_ids.shape[1], _prefix_scales(layout, weights)
        # Attention knows a column by the copy that serves it; a copy that serves none gets nothing.
        run.weights[:] = _by_copy(weights, columns, len(run.copies)), _by_copy(scales, columns, len(run.copies))
        above = torch.zeros_like(whole)
        _put_above_tails(layout, above, cotangent)
        of_tokens = weights.new_zeros(len(weights), whole.shape[1])
        of_tokens[:, :n_tail] = weights[:, layout.tail_row]
        runs = _runs(layout.groups, tails=True)
        for place in run.copies:
            copied = run.copy(place)
            begin = copied.start
            runs += [(unit, begin + first, begin + last) for unit, first, last in _runs(layout.groups, tails=False)]
            if place >= len(columns):
                continue
            column = columns[place]
            above[:, copied] = _above_prefixes(layout, whole[:, copied], cotangent, column, scales[column])
            if bool((weights[column] != 0).any()):
                of_tokens[column, copied] = 1.0 / scales[column]
        recorder.expect_packed(runs, of_tokens)
        torch.autograd.backward(whole, above, retain_graph=more)

    def _backward_through_tails(
        self,
        layout: PackedLayout,
        run: PackedRun,
        after: Tensor,
        cotangent: Cotangent,
        recorder: RowRecorder,
        *,
        more: bool,
    ) -> None:
        run.on_tails = True
        weights = cotangent.backward.weights
        run.weights[:] = (weights[list(cotangent.backward.columns)],)
        if not after.requires_grad:
            return
        above = torch.zeros_like(after)
        _put_above_tails(layout, above, cotangent)
        sequence = None if self.shares else layout.tail_row
        recorder.expect_packed(_runs(layout.groups, tails=True), weights[:, layout.tail_row], sequence)
        torch.autograd.backward(after, above, retain_graph=more)

    def _backward_through_prefixes(
        self,
        layout: PackedLayout,
        run: PackedRun,
        before: Tensor,
        cotangent: Cotangent,
        recorder: RowRecorder,
        *,
        more: bool,
    ) -> None:
        run.on_tails = False
        weights = cotangent.backward.weights
        served = [
            (place, column)
            for place, column in enumerate(cotangent.backward.columns)
            if bool((weights[column] != 0).any())
        ]
        scales = _prefix_scales(layout, weights)
        states = [(state, sums) for state in run.states.values() if (sums := state.take_sums()) is not None]
        for place, column in served:
            pairs = []
            for state, sums in states:
                for tensor, summed in zip((state.key, state.value), sums, strict=True):
                    if tensor.requires_grad:
                        scaled = summed[place] * scales[column, :, None].to(summed.dtype)
                        pairs.append((tensor, scaled.unsqueeze(0).to(tensor.dtype)))
            if before.requires_grad:
                pairs.append((before, _above_prefixes(layout, before, cotangent, column, scales[column])))
            if not pairs:
                return
            inverse = torch.zeros_like(scales)
            inverse[column] = 1.0 / scales[column]
            recorder.expect_packed(_runs(layout.groups, tails=False), inverse)
            last = not more and column == served[-1][1]
            torch.autograd.backward([tensor for tensor, _ in pairs], [own for _, own in pairs], retain_graph=not last)


def frequencies_depend_on_length(config: object) -> bool:
    """Whether a configuration asks for rotary embeddings of type longrope or dynamic, for any kind of layer."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            found.extend(value.values())
        elif value in ("longrope", "dynamic"):
            return True
    return False


def _by_copy(values: Tensor, columns: tuple[int, ...], copies: int) -> Tensor:
    """[copies, ...] the rows of ``values`` [C, ...] of the served columns, and zeros."""
    found = values.new_zeros(copies, *values.shape[1:])
    found[: len(columns)] = values[list(columns)]
    return found


def _put_above_tails(layout: PackedLayout, above: Tensor, cotangent: Cotangent) -> None:
    """What goes back at the tail tokens that predict another one, into ``above`` [1, Q or more, H]."""
    by_tail = layout.source < layout.tail_ids.shape[1]
    above[0, layout.source[by_tail]] = cotangent.signal[by_tail].to(above.dtype)


def _prefix_scales(layout: PackedLayout, weights: Tensor) -> Tensor:
    """[C, P] what goes through a prefix's graph is multiplied by to be of ordinary size; the sums are divided by it."""
    scales = torch.ones(len(weights), layout.prefix_ids.shape[1], dtype=torch.float64, device=weights.device)
    for group in layout.groups:
        for column, of_group in enumerate(weights[:, slice(*group.rows)]):
            if bool((of_group != 0).any()):
                scales[column, slice(*group.prefix)] = power_of_two_scale(of_group)
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


def _above_prefixes(layout: PackedLayout, before: Tensor, cotangent: Cotangent, column: int, scales: Tensor) -> Tensor:
    """[1, P, H] what goes back at the last token of every prefix: its responses' parts, summed with weights, and scaled."""
    weights = cotangent.backward.weights[column]
    n_tail = layout.tail_ids.shape[1]
    by_prefix = layout.source >= n_tail
    units = cotangent.signal[by_prefix]
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
