"""One microbatch by capture: which forward, what the recorder is told, and what is left to slower ways.

Legend: S_i sequence log-prob, c_i and a_i coefficients, X_u = Σ c_i ∇S_i, g_u = Σ a_i ∇S_i.

The first way that a model allows is taken: packed sequences whose prompts run once; packed whole sequences (with reentrant
checkpointing); a prompt's tokens once and its responses from a cache of their keys and values; padded whole sequences with
log-probs taken from hidden states; padded whole sequences and the model's own logits. Each is held against plain ones once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_fast.capture import CapturedModules, SignalRows
from entropy_fast.capture.modules import uncaptured_uses
from entropy_fast.checks.grad_context import assert_attached
from entropy_fast.checks.model_state import checkpointed_modules, reentrant_checkpointing
from entropy_fast.columns.coefficients import Coefficients, SequenceTable, labels_of, power_of_two_scale
from entropy_fast.columns.losses import padded_backwards, sequence_losses
from entropy_fast.columns.token_coefficients import ScoredTokens, coefficients_of
from entropy_fast.probe_components import DETACHED_FIX, ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.packed import PackedPass
from entropy_fast.ways.padded import (
    ForwardResult,
    OutputLayer,
    PackedBatch,
    find_output_head,
    hidden_logprobs,
    pack_rows,
    same_logits,
)
from entropy_fast.ways.shared_prefix import (
    backward_through_prefix,
    forward_with_shared_prefix,
    frequencies_depend_on_length,
    prefix_length,
    same_with_shared_prefix,
)
from entropy_fast.ways.trial import plain_logprobs, refuse_interaction, same_packed, sees_a_window, trial_rows

__all__ = ["CapturePass"]


class CapturePass:
    """Runs microbatches of one model.

    Args:
        components: model, options and guards.
    """

    def __init__(self, components: ProbeComponents) -> None:
        self._components = components
        self._left_out: frozenset[str] = frozenset()
        self._modules = self._capture()
        self._packed: PackedPass | None = None
        self._output_layer: OutputLayer | None = None
        self._tried = False
        self._trial: tuple[int, float] | None = None  # a sequence and its log-prob by the way that was chosen
        self._shares_prefix: bool | None = None  # not tried yet
        self._n_shared = self._n_whole = 0  # microbatches by the way they were gone through

    @property
    def left_out(self) -> tuple[str, ...]:
        """Trainable parameters on the slower path, in registry order."""
        return tuple(n for n in self._components.registry.names if n not in self._modules.captured)

    @property
    def note(self) -> str | None:
        """A sentence about the parameters on the slower path; None when there are none."""
        if not self.left_out:
            return None
        return (
            f"{len(self.left_out)} of {len(self._components.registry.parameters)} trainable parameters are used in ways the "
            f"one-pass engine does not know (the first: '{self.left_out[0]}'); their gradients took two backwards a prompt."
        )

    @property
    def captured(self) -> str:
        """How many parameters are captured, in words."""
        total = len(self._components.registry.parameters)
        return f"{total - len(self.left_out)} of {total} parameters captured"

    @property
    def way(self) -> str:
        """Which way was taken, in words."""
        if self.packs:
            assert self._packed is not None
            what = "prompts' tokens shared by their responses" if self._packed.share else "whole sequences"
            return f"packed without padding, {what}"
        if self._output_layer is None:
            return "whole sequences, the model's own logits"
        hidden = "log-probs from hidden states without logits"
        if self._n_shared and not self._n_whole:
            return f"every prompt's tokens run once for its responses, {hidden}"
        if self._n_shared:
            share = f"{self._n_shared} of {self._n_shared + self._n_whole} microbatches"
            return f"prompts' tokens run once for their responses in {share}, {hidden}"
        return f"whole sequences, {hidden}"

    @property
    def packs(self) -> bool:
        """Whether microbatches are packed; known after `choose`."""
        return self._packed is not None and not self.left_out

    @property
    def shares(self) -> bool:
        """Whether a prompt's tokens run once; known after `choose`, and where not packing, after the first microbatch."""
        if self._packed is not None and not self.left_out:
            return self._packed.share
        return bool(self._shares_prefix) and not self.left_out

    def backwards(self, labels: str) -> int:
        """How often a microbatch goes backward: once for X and Y together, or once for each."""
        return len(labels) if self._components.config.coefficients_by_token else 1

    @property
    def prompt_forwards(self) -> int:
        """How often prompts' tokens ran forward in the microbatches so far: the most that any of them took."""
        return self._packed.prompt_forwards if self._packed is not None and self.shares else 1

    def leave_out(self, names: set[str]) -> None:
        """Put these parameters on the slower path from now on, and those that share a module with them."""
        self._left_out |= names
        self._modules = self._capture()

    def choose(self, rollouts: Rollouts) -> None:
        """Once: find the first way that gives this model's log-probs.

        Raises:
            ModelStateError: log-probs are random, or sequences of one batch interact.
        """
        if self._tried:
            return
        self._tried = True
        components = self._components
        components.registry.check("CapturePass")
        head = find_output_head(components.registry.module)
        config = None if head is None else getattr(head.decoder, "config", None)
        share = reentrant_checkpointing(components.model) is None
        rows = trial_rows(rollouts, longest=not share or sees_a_window(config))
        expected = plain_logprobs(components, rollouts, rows)
        # From another random state, so that randomness nobody switched off shows as a difference.
        torch.rand(1, device=components.device)
        if expected.dtype.itemsize < 4:
            # In 16 bits another way to the same log-probs rounds too differently to tell: the same way once more.
            again = plain_logprobs(components, rollouts, rows)
            components.check_repeatable(expected.sequences.double().cpu(), again.sequences.double().cpu(), rows)
        else:
            self._trial = (int(rows[0]), float(expected.sequences[0]))
        if head is not None and not frequencies_depend_on_length(config):
            packed = PackedPass(components, head, share=share)
            if same_packed(packed, rollouts, rows, expected):
                self._packed = packed
                return
        refuse_interaction(components, rollouts)
        if head is not None and head.frozen is not None:
            with components.autocast():
                first = pack_rows(rollouts, rows[:1], components.device)
                works = same_logits(components.registry.module, head.frozen, first)
            self._output_layer = head.frozen if works else None

    def run(
        self,
        rollouts: Rollouts,
        rows: Tensor,
        unit: list[int],
        gradients: SignalRows,
        tables: dict[str, SequenceTable],
        labels: str = "XY",
    ) -> set[str]:
        """Add one microbatch of whole prompts to ``gradients``.

        Args:
            rollouts: the batch, which `choose` has seen.
            rows: [n] row indices, those of one prompt next to one another.
            unit: [n] unit of every row, rows of one unit next to one another.
            gradients: the recorder.
            tables: where S_i, c_i and a_i are written.
            labels: which of X and Y is wanted.

        Returns:
            Names of parameters that turn out not to be capturable; then ``gradients`` is of no use.
        """
        components = self._components
        components.registry.check("CapturePass")
        with self._modules.recording(gradients):
            gradients.start(rows)
            if self._packed is not None and self.packs:
                packed = self._packed.of_whole_sequences() if gradients.whole_sequences else self._packed
                signals = packed.run(rollouts, rows, unit, gradients, labels)
                self._put(tables, rows, signals.sequence_logprobs, signals.coefficients)
                return self._refused(gradients)
            if not gradients.whole_sequences:
                shared = self._with_shared_prefix(rollouts, rows, unit, gradients, tables, labels)
                self._n_shared += shared
                self._n_whole += not shared
                if shared:
                    return self._refused(gradients)
            forward = self.forward(rollouts, rows, labels)
            coefficients = components._coefficients(forward, rollouts, rows, labels)
            self._put(tables, rows, forward.sequence_logprobs, coefficients)
            self._slower_path(forward, coefficients, unit, gradients, labels)
            for loss, weights, more in padded_backwards(forward, coefficients, labels):
                gradients.expect(unit, (weights[0], weights[1]), _positions(forward))
                torch.autograd.backward(loss, retain_graph=more)
            gradients.pause()
        return self._refused(gradients)

    def _put(self, tables: dict[str, SequenceTable], rows: Tensor, S: Tensor, coefficients: Coefficients) -> None:
        for table in tables.values():
            table.put(rows, S, coefficients)
        if self._trial is None:
            return
        row, expected = self._trial
        found = S.detach()[(rows == row).to(S.device)].double().cpu()
        if len(found):
            self._trial = None
            self._components.check_repeatable(torch.tensor([expected]).double(), found, torch.tensor([row]))

    def _refused(self, gradients: SignalRows) -> set[str]:
        """Parameters that turned out not to be capturable; ordinary gradients are removed."""
        registry = self._components.registry
        refused = gradients.refused | uncaptured_uses(registry.tensors, registry.names, self._modules.captured)
        for parameter in registry.tensors:
            parameter.grad = None
        return refused

    def _with_shared_prefix(
        self,
        rollouts: Rollouts,
        rows: Tensor,
        unit: list[int],
        gradients: SignalRows,
        tables: dict[str, SequenceTable],
        labels: str,
    ) -> bool:
        """The microbatch with every prompt's tokens run once; False when that cannot be done, and then nothing has been."""
        components = self._components
        if self._output_layer is None or self._shares_prefix is False or self.left_out:
            return False
        prompts = rollouts.prompt_index[rows]
        parts = [(int(p), rows[prompts == p]) for p in dict.fromkeys(prompts.tolist())]
        batches = [pack_rows(rollouts, own, components.device) for _, own in parts]
        lengths = [prefix_length(batch) for batch in batches]
        if None in lengths:
            return False
        if self._shares_prefix is None:
            self._shares_prefix = self._same_with_shared_prefix(batches[0], lengths[0])
        if not self._shares_prefix:
            return False
        unit_of = dict(zip(prompts.tolist(), unit, strict=True))
        for (prompt, own), batch, length in zip(parts, batches, lengths, strict=True):
            assert length is not None
            gradients.pause()
            with components.autocast():
                forward = forward_with_shared_prefix(
                    self._output_layer,
                    batch,
                    length,
                    want_entropies=components.config.wants_token_entropies_for(labels),
                )
            assert_attached("S", forward.sequence_logprobs, "CapturePass", DETACHED_FIX)
            coefficients = coefficients_of(components.config, rollouts, own, ScoredTokens.of(forward), labels)
            self._put(tables, own, forward.sequence_logprobs, coefficients)
            for loss, weights, more in padded_backwards(forward, coefficients, labels):
                both = (weights[0], weights[1])
                gradients.expect([unit_of[prompt]] * len(own), both, batch.input_ids.shape[1] - length)
                torch.autograd.backward(loss, retain_graph=more)
                backward_through_prefix(forward, both, unit_of[prompt], gradients, length, more=more)
        return True

    def _same_with_shared_prefix(self, batch: PackedBatch, length: int | None) -> bool:
        """Whether this model gives the same log-probs when responses continue from the prompt's keys and values."""
        if length is None or self._output_layer is None or checkpointed_modules(self._components.model):
            # With gradient checkpointing transformers drops the cache.
            return False
        with torch.no_grad(), self._components.autocast():
            return same_with_shared_prefix(self._output_layer, batch, length)

    def forward(self, rollouts: Rollouts, rows: Tensor, labels: str = "XY") -> ForwardResult:
        """Log-probs of the given rows with their graph, without logits where the output layer allows that."""
        components = self._components
        if self._output_layer is None:
            return components._compute_aligned_batch_logprobs(rollouts, rows)
        batch = pack_rows(rollouts, rows, components.device)
        with components.autocast():
            forward = hidden_logprobs(
                self._output_layer, batch, want_entropies=components.config.wants_token_entropies_for(labels)
            )
        assert_attached("hidden states", forward.logits, "CapturePass", DETACHED_FIX)
        assert_attached("S", forward.sequence_logprobs, "CapturePass", DETACHED_FIX)
        return forward

    def _slower_path(
        self,
        forward: ForwardResult,
        coefficients: Coefficients,
        unit: Sequence[int],
        gradients: SignalRows,
        labels: str,
    ) -> None:
        """Gradients of the parameters that are not captured: one backward for each that is wanted, over the same graph."""
        left = [
            (p.name, p.tensor) for p in self._components.registry.parameters if p.name not in self._modules.captured
        ]
        if not left:
            return
        losses = {label: sequence_losses(forward, coefficients, label) for label in labels_of(labels)}
        for term in gradients.terms(unit, labels):
            members = term.members.to(coefficients.entropy.device)
            scale = power_of_two_scale(members * coefficients.largest(term.label))
            own = losses[term.label]
            torch.autograd.backward(((scale * members).to(own.dtype) * own).sum(), retain_graph=True)
            for name, parameter in left:
                if parameter.grad is not None:
                    gradients.put(name, term, parameter.grad / scale)
                    parameter.grad = None

    def _capture(self) -> CapturedModules:
        registry = self._components.registry
        names = {id(p.tensor): p.name for p in registry.parameters}
        return CapturedModules(registry.module, names, self._left_out)


def _positions(forward: ForwardResult) -> int:
    return forward.token_logprobs.shape[1] + 1
