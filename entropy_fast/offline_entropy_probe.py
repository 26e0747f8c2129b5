"""`OfflineEntropyProbe`: from rollouts to a `DeltaH1Result` by one of the engines."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from entropy_fast.checks.exclusive import one_probe_at_a_time
from entropy_fast.checks.fit import check_rollouts_fit_model
from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.checks.model_state import refuse_shared_keys
from entropy_fast.columns import Side, TokenScores, Wanted, columns_of
from entropy_fast.columns.caller import as_caller
from entropy_fast.columns.candidate_tables import candidate_tables, needs_scores
from entropy_fast.columns.wanted import entropy_measure
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.context import ProbeContext, ProgressCallback
from entropy_fast.distributed.agreement import fingerprint, of_first_rank, refuse_others
from entropy_fast.distributed.team import Team, joined
from entropy_fast.engines import Engine, EngineKind, Scores, engine_kind
from entropy_fast.engines.probe_identity import probe_identity
from entropy_fast.engines.replicas import refuse_other_replicas
from entropy_fast.engines.resolving import OTHER_SCORES_FIX, SCORES_MAY_MISS, SCORES_MAY_MISS_IN_16_BITS
from entropy_fast.errors import ConfigError, EntropyFastWarning, RolloutsError
from entropy_fast.estimates.assembly import Setting, empty_response_message, same_batch_result, two_batch_result
from entropy_fast.estimates.attribution import Role
from entropy_fast.estimates.measured import Measured
from entropy_fast.estimates.merging import merged
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.estimates.sampled_prompts import PromptChunks, in_all_rows, of_rows, refuse_other_updates
from entropy_fast.resuming import FolderKeeper, discard_checkpoint
from entropy_fast.rollouts import EmptyResponseReport, Rollouts
from entropy_fast.sharded import PartedSums
from entropy_fast.step import GivenOptimizer, read_optimizer

__all__ = ["OfflineEntropyProbe"]


class OfflineEntropyProbe:
    """Probes one model with one optimizer state; build it again when either changes.

    Args:
        model: a causal language model, possibly wrapped.
        optimizer: see `fast_delta_h1`.
        estimate: what is estimated; None takes the defaults.
        run: how it is run; None takes the defaults.
        on_progress: called with stage, prompts done and prompts in all.
        team: the ranks that work on it, where the caller has brought them together already; None leaves that to
            ``run.ranks``.
        keeps_checkpoint: whether what was kept in ``run.checkpoint`` stays there when an estimate is made, for a caller who
            writes the result down before `entropy_fast.resuming.discard_checkpoint`.
        parted: whose sums are kept where, for a model that `entropy_fast.sharded.as_whole` has made; None for all of them here.

    Attributes:
        context: all of that, frozen.

    Raises:
        ConfigError: there is no such engine, or it has no use for an option.
        OptimizerStateError, LearningRateError, ModelStateError: model and optimizer do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: GivenOptimizer,
        *,
        estimate: EstimateOptions | None = None,
        run: RunOptions | None = None,
        on_progress: ProgressCallback | None = None,
        team: Team | None = None,
        keeps_checkpoint: bool = False,
        parted: PartedSums | None = None,
    ) -> None:
        estimate, run = estimate or EstimateOptions(), run or RunOptions()
        self._kind: EngineKind = engine_kind(run)
        no_next_step = self._kind.no_next_step(estimate, run)
        any_kind = estimate.step != "adam_static" and no_next_step is None
        at_hand = read_optimizer(optimizer, model, any_kind=any_kind)
        self.context = ProbeContext.of(model, at_hand, estimate, run, on_progress, no_next_step, parted)
        self._team, self._state, self._keeps_checkpoint = team, at_hand, keeps_checkpoint
        self._measure = entropy_measure(self.context.estimate, Wanted(), None)

    @property
    def engine(self) -> str:
        """Name of the engine that is used."""
        return self._kind.name

    def compute_delta_h1(self, rollouts: Rollouts, *, wanted: Wanted | None = None) -> DeltaH1Result:
        """Same-batch estimate: δH₁ = lr · U.

        Args:
            rollouts: the batch.
            wanted: what else is asked for: other functionals, the update as a loss, updates to compare; None for nothing.

        Raises:
            GradContextError: called under ``inference_mode`` or ``no_grad``.
            RolloutsError: fewer than two prompts, a prompt with one response (``entropy_estimator="score_function"``), no
                ``old_logprobs`` for ``importance_ratio="token"``, or nothing left.
            ConfigError: the engine has no diagonal (``jvp``), or no use for an option with one batch.
        """
        assert_grad_context("OfflineEntropyProbe.compute_delta_h1")
        wanted = wanted or Wanted()
        with self._joined(wanted, rollouts=rollouts) as probe:
            probe._check_live(wanted)
            wanted = probe._worked_out(wanted, rollouts)
            if self.context.estimate.samples:
                return probe._sampled(rollouts, wanted)
            return probe._asked(wanted, rollouts, rollouts)._same_batch(rollouts)

    @contextlib.contextmanager
    def _joined(self, wanted: Wanted, **batches: Rollouts) -> Iterator[OfflineEntropyProbe]:
        """The same probe with the ranks that work on it, and with what a process before this one left of it."""
        run, probe = self.context.run, copy.copy(self)
        with joined(run.ranks, run.rank_timeout, self._team) as team:
            probe.context = dataclasses.replace(self.context, team=team)
            team.enter("agreement")
            refuse_other_replicas(team, probe.context, self._state)
            if run.checkpoint is None:
                yield probe
                return
            team.enter("checkpoint")
            identity = probe_identity(probe.context, self._state, wanted, batches, self.engine)
            with FolderKeeper.of(os.fspath(run.checkpoint), run.checkpoint_seconds, team, identity) as keeper:
                probe.context = dataclasses.replace(probe.context, keeper=keeper)
                yield probe
            team.meet()  # nobody lets go of what somebody may need once more
            if not self._keeps_checkpoint:
                discard_checkpoint(os.fspath(run.checkpoint), team)

    def _same_batch(self, rollouts: Rollouts) -> DeltaH1Result:
        measured, batch, empty = self._measured(rollouts)
        return same_batch_result(measured, self._setting(), batch, empty)

    def _sampled(self, rollouts: Rollouts, wanted: Wanted) -> DeltaH1Result:
        """From chunks of prompts, until there are as many as asked for or the direct part is known well enough."""
        estimate, kept = self.context.estimate, rollouts.without_empty_responses()[0]
        chunks = PromptChunks(rollouts, estimate.sample, estimate.relative_error)
        found: tuple[Measured, DeltaH1Result] | None = None
        rows = torch.zeros(0, dtype=torch.int64)
        while chunks.go_on(None if found is None else found[1]):
            own = chunks.next_rows()
            part, rows = rollouts.select_rows(own), torch.cat([rows, own])
            share = part.without_empty_responses()[0].n_prompts / kept.n_prompts
            probe = self._asked(of_rows(wanted, own, share), part, part)
            probe.context = dataclasses.replace(probe.context, prompts_of_batch=kept.n_prompts)
            measured, _, _ = probe._measured(part)
            measured = measured if found is None else merged(found[0], measured)
            taken = rollouts.select_rows(rows)
            probe._measure = entropy_measure(estimate, of_rows(wanted, rows), taken)
            batch, empty = taken.for_autograd().without_empty_responses()
            found = measured, same_batch_result(measured, probe._setting(), batch, empty)
        assert found is not None
        return in_all_rows(found[1], rollouts, rows)

    def _measured(self, rollouts: Rollouts) -> tuple[Measured, Rollouts, EmptyResponseReport]:
        """What the engine finds in one batch, the batch without empty responses, and which were left out."""
        engine = self._engine(1)
        batch, empty = self._prepare(rollouts, *Side)
        if batch.n_prompts < 2:
            raise RolloutsError(
                f"the same-batch estimate needs at least 2 prompts with responses, found {batch.n_prompts}.",
                fix="probe more prompts, or pass entropy_rollouts for the two-batch estimate.",
            )
        measured = self._alone(lambda: engine.same_batch(batch), batch)
        self._check_scores(measured)
        return measured, batch, empty

    def run_mixed_probe(
        self, *, entropy_rollouts: Rollouts, update_rollouts: Rollouts, wanted: Wanted | None = None
    ) -> DeltaH1Result:
        """Two-batch estimate: δH₁ = lr · X̄_E · Ȳ_U, its error conditional on the update batch.

        Args:
            entropy_rollouts: E, where the entropy gradient is estimated.
            update_rollouts: U, what the update is made from; independent of E.
            wanted: see `compute_delta_h1`.

        Raises:
            GradContextError: called under ``inference_mode`` or ``no_grad``.
            RolloutsError: the two are the same batch, or one of them cannot be used.
            ConfigError: ``blocks``, which have no meaning here, or an option that the engine has no use for with two batches.
            ForwardDerivativeError: the engine is ``jvp``, and the model has an operation that it cannot go through.
        """
        assert_grad_context("OfflineEntropyProbe.run_mixed_probe")
        if self.context.estimate.samples:
            raise ConfigError(
                "sample and relative_error are about the batch of a live gradient, and an entropy batch was given, all of "
                "which is gone through.",
                fix="leave them out, or the entropy batch.",
            )
        wanted = wanted or Wanted()
        with self._joined(wanted, entropy_rollouts=entropy_rollouts, update_rollouts=update_rollouts) as probe:
            probe._check_live(wanted)
            wanted = probe._worked_out(wanted, update_rollouts)
            return probe._asked(wanted, entropy_rollouts, update_rollouts)._two_batch(entropy_rollouts, update_rollouts)

    def _two_batch(self, entropy_rollouts: Rollouts, update_rollouts: Rollouts) -> DeltaH1Result:
        if self.context.estimate.blocks is not None:
            raise ConfigError(
                f"run_mixed_probe: blocks={self.context.estimate.blocks} groups the units of the same-batch estimate; the "
                "two-batch estimate has none.",
                fix="leave blocks out, or the entropy batch.",
            )
        if entropy_rollouts.shares_all_sequences_with(update_rollouts):
            raise RolloutsError(
                "run_mixed_probe: every sequence of one batch stands in the other too; X̄·Ȳ of one batch with itself is "
                "biased by the diagonal K_nn.",
                fix="pass independently sampled batches, or use compute_delta_h1 for one batch.",
            )
        engine = self._engine(2)
        entropy, empty_entropy = self._prepare(entropy_rollouts, Side.FUNCTIONAL)
        update, empty_update = self._prepare(update_rollouts, Side.UPDATE)
        empty: dict[Role, EmptyResponseReport] = {"entropy": empty_entropy, "update": empty_update}
        measured = self._alone(lambda: engine.two_batch(entropy, update), entropy, update)
        self._check_scores(measured)
        return two_batch_result(measured, self._setting(), entropy, update, empty)

    @property
    def _live(self) -> bool:
        return self.context.next_step is not None and self.context.next_step.live is not None

    def _check_live(self, wanted: Wanted) -> None:
        if self._live:
            refuse_other_updates(wanted, self.context.estimate, self.context.run)

    def _worked_out(self, wanted: Wanted, rollouts: Rollouts) -> Wanted:
        """With candidates beside a live gradient as coefficients of its whole batch, of which a sample may be gone through."""
        if not self._live or not wanted.candidates or wanted.update is None or callable(wanted.update):
            return wanted
        given = as_caller(wanted, self.context.registry.module)
        scores = wanted.scores
        if scores is None and needs_scores(given.candidates):
            scores = self._scores(rollouts)
        tables = candidate_tables(given.candidates, wanted.update, scores, rollouts, self.context.estimate)
        return dataclasses.replace(wanted, candidates=tables)

    def _scores(self, rollouts: Rollouts) -> TokenScores:
        """What the policy says of every response token of a batch."""
        probe = self._asked(None, rollouts, rollouts)
        engine = probe._engine(1)
        if not isinstance(engine, Scores):
            raise ConfigError(
                f"`updates` with gradient='live' and engine {self.engine!r}, which does not score a batch.",
                fix="pass scores, or use engine='one_pass'.",
            )
        batch = rollouts.for_autograd().without_empty_responses()[0]
        with one_probe_at_a_time(wait=self.context.run.when_busy == "wait"):
            return engine.score(batch).spread(rollouts)

    def _asked(self, wanted: Wanted | None, entropy: Rollouts, update: Rollouts) -> OfflineEntropyProbe:
        """The same probe with the columns of one call."""
        probe, wanted = copy.copy(self), as_caller(wanted or Wanted(), self.context.registry.module)
        columns = columns_of(self.context.estimate, wanted, entropy, update)
        scores = None if wanted.scores is None else wanted.scores.of_rows(update)
        probe.context = dataclasses.replace(self.context, columns=columns, scores=scores)
        probe._measure = entropy_measure(self.context.estimate, wanted, entropy)
        return probe

    def _check_scores(self, measured: Measured) -> None:
        """Raise where scores that were given are not the model's.

        Raises:
            RolloutsError: they are not.
        """
        given = self.context.scores
        if given is None:
            return
        found = measured.sequences[Side.UPDATE.value].sequence_logprobs
        lengths = (given.logprobs != 0).sum(-1).clamp_min(1).cpu()
        gap = ((given.logprobs.double().cpu().sum(-1) - found).abs() / lengths).nan_to_num(0.0)
        narrow = any(dtype.itemsize < 4 for dtype in self.context.compute_dtypes)
        if float(gap.max()) > (SCORES_MAY_MISS_IN_16_BITS if narrow else SCORES_MAY_MISS):
            row = int(gap.argmax())
            raise RolloutsError(
                f"scores: the log-probs of row {row} (empty responses not counted) are {float(gap[row]):.3g} nats a token away "
                "from the model's.",
                fix=OTHER_SCORES_FIX,
            )

    def _alone(self, measure: Callable[[], Measured], *batches: Rollouts) -> Measured:
        """While no other probe runs in this process; by all ranks, which hold the same batches, alike."""
        context = self.context
        refuse_others(
            context.team,
            {"rollouts": fingerprint(batches), "columns": fingerprint(context.columns.members)},
            fix="pass the same, whole rollouts (and what goes with them) on all ranks; "
            "entropy_fast.distributed.gather_rows makes them of rows that are spread over ranks.",
        )
        with one_probe_at_a_time(wait=context.run.when_busy == "wait"):
            measured = measure()
        context.team.enter("result")
        return of_first_rank(context.team, measured)

    def _engine(self, batches: int) -> Engine:
        refuse_shared_keys(self.context.model)
        reason = self._kind.why_not(batches, self.context)
        if reason is not None:
            raise ConfigError(
                f"engine {self._kind.name!r}: {reason}.",
                fix="pass entropy_rollouts, an independent batch, for the two-batch estimate; or leave the option out, or use "
                "engine='one_pass', for one batch."
                if batches == 1
                else "leave the option out, or the entropy batch.",
            )
        return self._kind.make(self.context)

    def _refuse_truncated(self, batch: Rollouts) -> None:
        """Raise where responses were drawn from a truncated policy, and where they go is asked for.

        Raises:
            RolloutsError: they were.
        """
        alone = (
            self.context.estimate.wanted_parts == ("direct",)
            and len(self.context.columns.of_side(Side.FUNCTIONAL)) == 1
        )
        if batch.truncated_by and not alone:
            raise RolloutsError(
                f"Rollouts: sampled with {', '.join(batch.truncated_by)}. Prefixes are then visited as often as the truncated "
                "policy does, whose entropy is another quantity; the visitation part, and the total with it, would be of "
                "neither.",
                fix="take the direct part alone (EstimateOptions(parts=('direct',)), --parts direct) and no functionals, which "
                "is exact at the prefixes that were visited; or sample with top-p 1, top-k 0 (off) and min-p 0.",
            )

    def _setting(self) -> Setting:
        context = self.context
        return Setting(
            self._kind.name,
            context.estimate,
            context.run,
            context.step.learning_rate,
            context.step.geometry if context.next_step is None else "next_step",
            tuple(context.registry.names),
            frozenset(context.compute_dtypes),
            self._measure,
            (*context.step.notes, *context.notes),
            context.next_step is None or (context.next_step.rule.linear and context.next_step.live is None),
        )

    def _prepare(self, rollouts: Rollouts, *sides: Side) -> tuple[Rollouts, EmptyResponseReport]:
        for side in sides:
            if side is Side.UPDATE:
                self.context.columns.of_side(side).check(rollouts)  # before anything else of the batch is looked at
        batch, empty = rollouts.for_autograd().without_empty_responses()
        if empty.sequences:
            warnings.warn(empty_response_message(empty), EntropyFastWarning, stacklevel=3)
        for side in sides:
            self.context.columns.of_side(side).check(batch)
            if side is Side.FUNCTIONAL:
                self._refuse_truncated(batch)
        check_rollouts_fit_model(batch, self.context.registry.module)
        return batch, empty
