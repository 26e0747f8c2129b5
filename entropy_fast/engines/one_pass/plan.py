"""How the one-pass engine went through the batches: what its sweeps did, and the plan that a result shows."""

from __future__ import annotations

import dataclasses

import torch

from entropy_fast.config import RunOptions
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.collectives import add_up, most_of
from entropy_fast.engines.one_pass.costs import CostModel
from entropy_fast.engines.one_pass.course import SweepReport
from entropy_fast.engines.one_pass.runner import Runner
from entropy_fast.engines.one_pass.sweep import SweepRequest, prompt_tokens
from entropy_fast.estimates.measured import Plan
from entropy_fast.ways import Way

__all__ = ["OnePassPlan", "PassLog"]


@dataclasses.dataclass(frozen=True)
class OnePassPlan(Plan):
    """How the one-pass engine went through a batch.

    Attributes:
        captured: how many parameters were captured.
        kernel_kept: whether every unit's gradients were kept, which gives the whole kernel.
        microbatches: in one sweep over the batch.
        largest_microbatch: tokens.
        sweeps: over a batch, each one forward and one backward or more.
        backwards: of a sweep: one for the columns by sequence together, and one for each whose coefficients differ from token
            to token.
        prompt_forwards: how often a sweep runs the tokens that a prompt's responses share forward: more than once where they
            stand in the row of the responses, once for every column of a backward.
        prompt_backwards: and how often backward.
        by_token: names of the columns that took a backward of their own.
        operations: estimate, multiplies and adds.
        stored_bytes: of the gradients that were kept.
        activation_bytes: estimate, of the largest microbatch.
        ranks: that the units were dealt to. Microbatches and bytes are those of the rank that has most, operations those of
            all.
    """

    captured: str = ""
    kernel_kept: bool = False
    microbatches: int = 0
    largest_microbatch: int = 0
    sweeps: int = 0
    backwards: int = 1
    prompt_forwards: int = 1
    prompt_backwards: int = 1
    by_token: tuple[str, ...] = ()
    operations: float = 0.0
    stored_bytes: int = 0
    activation_bytes: int = 0
    ranks: int = 1

    def __str__(self) -> str:
        kept = "every unit's gradients kept" if self.kernel_kept else "a second sweep for projections"
        prompts = ""
        if self.backwards > 1:
            each = f": {', '.join(self.by_token)}" if self.by_token else ""
            prompts = f"; columns whose coefficients differ from token to token take a backward each{each}"
        elif self.prompt_forwards > 1:
            prompts = f", with the prompts' tokens in it {self.prompt_forwards} times, once for every column"
        elif self.prompt_backwards > 1:
            prompts = f" (and {self.prompt_backwards} through the prompts' tokens)"
        dealt = f"units dealt to {self.ranks} ranks; " if self.ranks > 1 else ""
        costs = (
            f"{self.way}; {dealt}{self.captured}; {kept}; {self.microbatches} microbatch(es) of at most "
            f"{self.largest_microbatch} tokens; {self.sweeps} sweep(s) of one forward and "
            f"{_number(self.backwards)}{prompts}; about "
            f"{self.operations / 1e9:.3g} billion operations, {_size(self.stored_bytes)} of gradients and "
            f"{_size(self.activation_bytes)} of activations. " + "; ".join(self.reasons) + "."
        )
        return f"{costs} {self.refusals}." if self.refusals else costs


class PassLog:
    """What the sweeps of a probe did, and the plan that they make.

    Args:
        costs: of the model.

    Attributes:
        stored: bytes of the gradients that are kept.
        scored: batches whose log-probs and entropies were found by a sweep before.
    """

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._reports: list[tuple[SweepReport, float]] = []  # and operations, of every sweep
        self._backwards = 1  # of the sweep that takes most
        self._most_columns = 1
        self.by_token: tuple[str, ...] = ()
        self.stored = self.scored = 0

    def add(self, request: SweepRequest, report: SweepReport, way: Way) -> None:
        """One sweep is done."""
        shared, columns = way.shares and not request.whole_sequences, request.columns
        own = [prompt for unit in request.units for prompt in unit]
        of_prompts = prompt_tokens(request.rollouts, shared=shared)
        tokens = sum(of_prompts[prompt] for prompt in own)
        rows = torch.isin(request.rollouts.prompt_index, torch.tensor(own, dtype=torch.int64))
        scored = int(request.rollouts.response_lengths[rows].sum())
        prefix = max(0, tokens - scored) if shared else 0
        if columns.backwards >= self._backwards:
            self._backwards = columns.backwards
            self.by_token = tuple(column.name for column in columns if column.by_token)
        self._most_columns = max(self._most_columns, columns.most_at_once)
        operations = self._costs.operations(
            prefix,
            tokens - prefix,
            scored,
            len(columns),
            min(report.prompt_forwards, len(columns)),
            backwards=columns.backwards,
            entropies=columns.needs_entropies,
        )
        self._reports.append((report, operations))

    def plan(self, context: ProbeContext, runner: Runner) -> OnePassPlan:
        """After all sweeps; with several ranks, of all of them."""
        assert self._reports
        reports = [report for report, _ in self._reports]
        microbatches, largest, copies = most_of(
            context.team,
            [
                max(report.microbatches for report in reports),
                max(report.largest for report in reports),
                max(report.prompt_forwards for report in reports),
            ],
        )
        total = torch.tensor(
            [sum(operations for _, operations in self._reports), sum(float(report.halved) for report in reports)],
            dtype=torch.float64,
        )
        add_up(context.team, [total])
        operations, halved = total.tolist()
        return OnePassPlan(
            way=str(runner.way),
            not_taken=runner.not_taken,
            reasons=tuple(self._reasons(context.run, runner.way, int(halved))),
            captured=runner.captured,
            kernel_kept=self.stored > 0,
            microbatches=microbatches,
            largest_microbatch=largest,
            sweeps=len(reports),
            backwards=self._backwards,
            prompt_forwards=copies,
            prompt_backwards=2 if runner.way.shares else 1,
            by_token=self.by_token,
            operations=operations,
            stored_bytes=self.stored,
            activation_bytes=largest * self._costs.bytes_per_token,
            ranks=context.team.size,
        )

    def _reasons(self, options: RunOptions, way: Way, halved: int) -> list[str]:
        if options.prompts_per_microbatch is not None:
            reasons = [f"prompts_per_microbatch={options.prompts_per_microbatch} was asked for"]
        elif way.packs:
            full = self._costs.full_rate_tokens
            reasons = [f"products reach their full rate at about {full} tokens, more only takes memory"]
        else:
            reasons = ["one prompt at a time, since padded rows are not packed"]
        if not self.stored:
            reasons.append("gradients of all units do not fit memory_budget")
        if self.scored:
            reasons.append("log-probs and entropies were found first, by a forward without gradients")
        if options.by_token:
            reasons.append("by_token takes a forward with tangents for every unit")
        if options.by_sequence:
            reasons.append("by_sequence takes one more sweep a batch, of whole sequences")
        if halved:
            reasons.append(f"memory ran out {halved} time(s) and microbatches were halved")
        return reasons


def _number(backwards: int) -> str:
    return "one backward" if backwards == 1 else f"{backwards} backwards"


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
