"""Runs microbatches by capture: which modules are captured, which way was chosen, and what is left to slower ones."""

from __future__ import annotations

import torch

from entropy_fast.capture import CapturedModules, RowRecorder
from entropy_fast.capture.modules import uncaptured_uses
from entropy_fast.checks.repeatability import check_repeatable
from entropy_fast.columns import SequenceTable
from entropy_fast.context import ProbeContext
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways import Choice, Microbatch, Passed, Trial, Way, choose_way

__all__ = ["Runner"]


class Runner:
    """Microbatches of one model.

    Args:
        context: of the probe.
    """

    def __init__(self, context: ProbeContext) -> None:
        self._context = context
        self._left_out: frozenset[str] = frozenset()
        self._modules = self._capture()
        self._trial: Trial | None = None
        self._choice: Choice | None = None
        self._expected: tuple[int, float] | None = None  # a sequence and its log-prob by the model's own forward

    @property
    def left_out(self) -> tuple[str, ...]:
        """Trainable parameters on the slower path, in registry order."""
        return tuple(n for n in self._context.registry.names if n not in self._modules.captured)

    @property
    def note(self) -> str | None:
        """A sentence about the parameters on the slower path; None when there are none."""
        if not self.left_out:
            return None
        return (
            f"{len(self.left_out)} of {len(self._context.registry.parameters)} trainable parameters are used in ways the "
            f"one-pass engine does not know (the first: '{self.left_out[0]}'); their gradients took two backwards a prompt."
        )

    @property
    def captured(self) -> str:
        """How many parameters are captured, in words."""
        total = len(self._context.registry.parameters)
        return f"{total - len(self.left_out)} of {total} parameters captured"

    @property
    def way(self) -> Way:
        """The way that was chosen; known after `choose`."""
        assert self._choice is not None
        return self._choice.way

    @property
    def not_taken(self) -> tuple[str, ...]:
        """What was not chosen, and why; known after `choose`."""
        assert self._choice is not None
        return self._choice.not_taken

    def leave_out(self, names: set[str]) -> None:
        """Put these parameters on the slower path from now on, and those that share a module with them."""
        self._left_out |= names
        self._modules = self._capture()
        self._choice = None

    @property
    def place(self) -> int:
        """Of the way among those that are known; known after `choose`."""
        assert self._choice is not None
        return len(self._choice.not_taken)

    def choose(self, rollouts: Rollouts, least: int = 0) -> None:
        """Find the first way that gives this model's log-probs, unless one is there; inside the context's ``probe_state``.

        Args:
            rollouts: the batch.
            least: place before which none is to be taken.

        Raises:
            ModelStateError: log-probs are random, or sequences of one batch interact.
        """
        if self._choice is not None and self.place >= least:
            return
        self._context.registry.check("one-pass engine")
        if self._trial is None:
            self._trial = Trial(self._context, rollouts)
            self._expected = self._trial.expected
        self._choice = choose_way(self._context, self._modules, self._trial, least)

    def run(self, microbatch: Microbatch, recorder: RowRecorder, table: SequenceTable | None) -> set[str]:
        """Add one microbatch to the recorder.

        Args:
            microbatch: of the batch that `choose` has seen.
            recorder: what takes its signals.
            table: where what is learned of the sequences is written; None for nowhere.

        Returns:
            Names of parameters that turn out not to be capturable; then what was recorded is of no use.
        """
        registry = self._context.registry
        registry.check("one-pass engine")
        with self._modules.recording(recorder):
            recorder.start(microbatch.rows)
            passed = self.way.run(microbatch, recorder)
        if table is not None:
            table.put(microbatch.rows, passed.sequence_logprobs, passed.coefficients)
        self._look_again(microbatch, passed)
        refused = recorder.refused | uncaptured_uses(registry.tensors, registry.names, self._modules.captured)
        for parameter in registry.tensors:
            parameter.grad = None
        return refused

    def _look_again(self, microbatch: Microbatch, passed: Passed) -> None:
        """Once: the sequence that was tried has to have the same log-prob in its microbatch."""
        if self._expected is None or self._trial is None or microbatch.rollouts is not self._trial.rollouts:
            return
        row, expected = self._expected
        found = passed.sequence_logprobs[(microbatch.rows == row).to(passed.sequence_logprobs.device)].double().cpu()
        if len(found):
            self._expected = None
            check_repeatable(torch.tensor([expected]).double(), found, torch.tensor([row]))

    def _capture(self) -> CapturedModules:
        registry = self._context.registry
        names = {id(p.tensor): p.name for p in registry.parameters}
        return CapturedModules(registry.module, names, self._left_out)
