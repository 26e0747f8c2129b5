"""The two-pass engine: X and Y by plain backward passes. Readable and guarded; every faster engine is checked against it.

Legend (docs/theory.md): S_i sequence log-prob, c_i and a_i coefficients of the functional and the update column,
X_n = Σ c_i ∇S_i, Y_n = P Σ a_i ∇S_i, K_nm = X_n · Y_m, E entropy batch, U update batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from entropy_fast.checks.grad_context import assert_attached, assert_grad_context
from entropy_fast.checks.repeatability import check_repeatable
from entropy_fast.columns import Coefficients, Columns, SequenceTable, Side, TokenScores
from entropy_fast.columns.coefficients import power_of_two_scale
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.context import ProbeContext, ProgressCallback
from entropy_fast.distributed.collectives import add_up, any_of
from entropy_fast.distributed.dealing import Share, share_of
from entropy_fast.engines.along import AlongSums
from entropy_fast.engines.along_updates import along_sums, with_rows
from entropy_fast.engines.gradient_sum import GradientSum, inner_product, parameter_products
from entropy_fast.engines.resolving import resolved_context
from entropy_fast.engines.sums import coverage_of, finish_functional, finish_update, finished
from entropy_fast.engines.two_pass import alpha_trick
from entropy_fast.engines.two_pass.gradient_routes import gradients_by_route
from entropy_fast.engines.two_pass.kept import kept_steps, tables_of
from entropy_fast.engines.two_pass.passes import Pass, kernel_between, measured_of, sums_of_dots
from entropy_fast.engines.two_pass.scoring import padded_scores
from entropy_fast.engines.unit_dots import unit_dots
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured
from entropy_fast.resuming import Tables
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import iter_microbatches, prompt_units
from entropy_fast.step import AdamState
from entropy_fast.ways.teacher_forcing import ForwardResult, PaddedBatch, align_logprobs, model_logits, pad_rows

__all__ = ["ProbeComponents"]


class ProbeComponents:
    """Forwards, backwards and kernel sums for one model, one optimizer state and one set of options.

    Args:
        model: a causal language model, possibly wrapped in DistributedDataParallel or compiled.
        state: the optimizer's Adam state for this model.
        estimate: what is estimated; None takes the defaults.
        run: how it is run; None takes the defaults.
        on_progress: called with stage, prompts done and prompts in all.

    Attributes:
        context: all of that, frozen.

    Raises:
        ModelStateError, LearningRateError: see `ProbeContext.of`.
    """

    def __init__(
        self,
        model: nn.Module,
        state: AdamState,
        estimate: EstimateOptions | None = None,
        run: RunOptions | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self.context = ProbeContext.of(model, state, estimate, run, on_progress)

    @classmethod
    def of(cls, context: ProbeContext) -> ProbeComponents:
        """For a context that is there."""
        components = cls.__new__(cls)
        components.context = context
        return components

    _assert_grad_context = staticmethod(assert_grad_context)

    def _teacher_force_logprobs(self, batch: PaddedBatch) -> ForwardResult:
        """One forward of ``batch``: aligned token log-probs and S [n]; logits and S are checked to carry a graph."""
        self._assert_grad_context("ProbeComponents._teacher_force_logprobs")
        context = self.context
        context.registry.check("ProbeComponents._teacher_force_logprobs")
        with context.autocast():
            logits = model_logits(context.registry.module, batch)
        assert_attached("logits", logits, "ProbeComponents._teacher_force_logprobs")
        forward = align_logprobs(
            logits,
            batch,
            want_entropies=context.columns.needs_entropies,
            temperature=context.estimate.policy_temperature,
        )
        assert_attached("S", forward.sequence_logprobs, "ProbeComponents._teacher_force_logprobs")
        return forward

    def _compute_aligned_batch_logprobs(self, rollouts: Rollouts, rows: Tensor) -> ForwardResult:
        """The given rows of the rollouts, laid out without left padding and teacher-forced."""
        self._assert_grad_context("ProbeComponents._compute_aligned_batch_logprobs")
        return self._teacher_force_logprobs(pad_rows(rollouts, rows, self.context.device))

    def _build_probe_loss(self, forward: ForwardResult, coefficients: Coefficients) -> Tensor:
        """The scalar whose gradient is that of the one column, summed over the prompts of the forward: Σ_i c_i S_i."""
        return coefficients.losses(forward, 0).sum()

    def _iter_prompt_microbatches(self, rollouts: Rollouts, prompts: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Row indices of successive microbatches of whole prompts."""
        chosen = list(range(rollouts.n_prompts)) if prompts is None else list(prompts)
        return iter_microbatches(rollouts, chosen, self.context.run.prompts_per_microbatch or 1)

    def _iter_prompts_as_units(self, rollouts: Rollouts) -> Iterator[list[int]]:
        """Prompt indices of every unit of the U-statistic (single prompts, or blocks)."""
        return iter(prompt_units(rollouts.n_prompts, self.context.estimate.blocks))

    def accumulate_sum_X(self, rollouts: Rollouts) -> GradientSum:  # noqa: N802 (X as in the theory)
        """X_sum = Σ_n X_n over all prompts, raw (not preconditioned).

        Raises:
            GradientCoverageError: no parameter received a gradient (or, strict, one did not).
        """
        self._assert_grad_context("ProbeComponents.accumulate_sum_X")
        own = self._resolved(rollouts, None)
        return finish_functional(own.context, own._pass(Side.FUNCTIONAL, own._share(rollouts)).total, rollouts)[0]

    def accumulate_sum_Y(self, rollouts: Rollouts) -> GradientSum:  # noqa: N802 (Y as in the theory)
        """Y_sum = P Σ_n g_n over all prompts, preconditioned.

        Raises:
            GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
        """
        self._assert_grad_context("ProbeComponents.accumulate_sum_Y")
        own = self._resolved(None, rollouts)
        return finish_update(own.context, own._pass(Side.UPDATE, own._share(rollouts)).total, rollouts)[0]

    def same_batch(self, rollouts: Rollouts) -> Measured:
        """See `Engine.same_batch`."""
        self._assert_grad_context("ProbeComponents.same_batch")
        return self._kernel_sums(rollouts, list(self._iter_prompts_as_units(rollouts)))

    def _compute_delta_h1_exact(self, rollouts: Rollouts) -> Measured:
        """Kernel sums with every prompt as a unit."""
        return self._kernel_sums(rollouts, prompt_units(rollouts.n_prompts, None))

    def _compute_delta_h1_blocks(self, rollouts: Rollouts) -> Measured:
        """Kernel sums with blocks of prompts as units."""
        return self._kernel_sums(rollouts, list(self._iter_prompts_as_units(rollouts)))

    def two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        """See `Engine.two_batch`."""
        self._assert_grad_context("ProbeComponents.two_batch")
        own = self._resolved(entropy, update)
        return own._two_batch(own._share(entropy), own._share(update))

    def _two_batch(self, entropy_share: Share, update_share: Share) -> Measured:
        context, entropy, update = self.context, entropy_share.rollouts, update_share.rollouts
        x_pass, y_pass = self._both_passes(entropy_share, update_share)
        sums = finished(context, x_pass.total, y_pass.total, entropy, update)
        x_totals = [(0, sums.x), *self.totals_after_first(Side.FUNCTIONAL, entropy_share)]
        g_totals = [y_pass.total, *(total for _, total in self.totals_after_first(Side.UPDATE, update_share))]
        y_sums = [sums.y, *(finish_update(context, total, update)[0] for total in g_totals[1:])]
        along = along_sums(context, g_totals, update, len(x_totals), None, entropy.n_prompts)
        found = [
            [self._between(entropy_share, update_share, x, (place, y), along[place : place + 1]) for x in x_totals]
            for place, y in enumerate(y_sums)
        ]
        found = with_rows(found, along, context.layout)
        how = "the double backward" if context.run.conditional_variance == "alpha" else "a backward a prompt"
        return measured_of(context, found, sums, (x_pass, y_pass), f"projections of the entropy batch by {how}")

    def _resolved(self, entropy: Rollouts | None, update: Rollouts | None) -> ProbeComponents:
        """For batches whose scores are known; these components stay as they are, for other batches."""
        return self.of(resolved_context(self.context, entropy, update, self.score))

    def score(self, rollouts: Rollouts) -> TokenScores:
        """Log-probs and entropies of every response token, by forwards without a graph."""
        share = self._share(rollouts)
        return padded_scores(self.context, share, self._iter_prompt_microbatches(rollouts, share.prompts))

    def _share(self, rollouts: Rollouts, units: list[list[int]] | None = None) -> Share:
        """The units (None for single prompts) that this rank goes through."""
        return share_of(self.context.team, rollouts, prompt_units(rollouts.n_prompts, None) if units is None else units)

    def _between(
        self,
        entropy: Share,
        update: Share,
        x: tuple[int, GradientSum],
        y: tuple[int, GradientSum],
        along: Sequence[AlongSums],
    ) -> KernelSums:
        """Sums between two batches of a functional and an update column: their places and sums; ``along`` of the latter."""
        (x_place, x_sum), (y_place, y_sum) = x, y
        if self.context.run.conditional_variance == "alpha" and not x_place:
            n_update = update.rollouts.n_prompts
            y_mean = [own / n_update for own in y_sum.tensors]
            rows = self.compute_conditional_variance_over_E_alpha(entropy.rollouts, y_mean) * n_update
        else:
            rows = self._projections(Side.FUNCTIONAL, entropy, y_sum.tensors, x_place, along)
        columns = self._projections(Side.UPDATE, update, x_sum.tensors, y_place)
        products = parameter_products(x_sum, y_sum)
        return KernelSums(float(products.sum()), rows, columns, by_parameter=products)

    def compute_conditional_variance_over_E_alpha(  # noqa: N802 (E as in the theory)
        self, entropy: Rollouts, y_mean: Sequence[Tensor]
    ) -> Tensor:
        """s_n = X_n · Ȳ of every prompt of the entropy batch by the alpha trick.

        The conditional variance of X̄ · Ȳ given the update batch is var(s_n) / B_E (`two_batch_estimate`).

        Args:
            entropy: the entropy batch E, B_E prompts.
            y_mean: Ȳ, one tensor per registered parameter.

        Returns:
            [B_E] s_n, fp64 on the CPU.

        Raises:
            CheckpointingError: the model checkpoints in reentrant mode.
            GradientCoverageError: no parameter receives a gradient from L.
            GraphDetachedError: the model cannot be differentiated twice.
        """
        self._assert_grad_context("ProbeComponents.compute_conditional_variance_over_E_alpha")
        share = self._share(entropy)
        own = self._resolved(entropy, None)
        alpha_trick.refuse_reentrant_checkpointing(own.context.model)
        columns, found = own._column(Side.FUNCTIONAL, 0), torch.zeros(entropy.n_prompts, dtype=torch.float64)
        with own.context.probe_state(), alpha_trick.twice_differentiable_attention():
            microbatches = self._iter_prompt_microbatches(entropy, share.prompts)
            kept = {"found": Tables({"found": found})}
            for rows in kept_steps(own.context, "alpha", (entropy, columns, share.prompts), kept, microbatches):
                forward = self._compute_aligned_batch_logprobs(entropy, rows)
                prompts = alpha_trick.put_projections(found, own.context, forward, columns, entropy, rows, y_mean)
                own.context.report("alpha", int(prompts.max()) + 1, entropy.n_prompts)
        add_up(own.context.team, [found])
        return found

    def _kernel_sums(self, rollouts: Rollouts, units: list[list[int]]) -> Measured:
        """Aggregate passes, then the diagonal phase: X_u by one backward and Y_u by a second on a fresh graph."""
        return self._resolved(rollouts, rollouts)._known_kernel_sums(self._share(rollouts, units))

    def _known_kernel_sums(self, share: Share) -> Measured:
        context, rollouts, sizes = self.context, share.rollouts, share.sizes
        x_pass, y_pass = self._both_passes(share, share)
        first, second = (found.table.sequence_logprobs for found in (x_pass, y_pass))
        check_repeatable(first, second, torch.arange(rollouts.n_sequences))
        sums = finished(context, x_pass.total, y_pass.total, rollouts, rollouts)
        x_totals = [sums.x, *(total for _, total in self.totals_after_first(Side.FUNCTIONAL, share))]
        g_totals = [y_pass.total, *(total for _, total in self.totals_after_first(Side.UPDATE, share))]
        y_sums = [sums.y, *(finish_update(context, total, rollouts)[0] for total in g_totals[1:])]
        dots = torch.zeros(len(y_sums), len(x_totals), len(sizes), len(sums.x.tensors), 3, dtype=torch.float64)
        kept: list[tuple[list[Tensor], list[Tensor]]] = []
        along = along_sums(context, g_totals, rollouts, len(x_totals), None)
        context.team.enter("diagonal")
        sums_so_far = {"dots": Tables({"dots": dots})} | {f"along {which}": own for which, own in enumerate(along)}
        asked, numbered = (rollouts, context.columns, share.units), zip(share.numbers, share.units, strict=True)
        for number, unit in kept_steps(context, "diagonal", asked, sums_so_far, numbered):
            x_units, g_units = (
                [self._gradient_sum(side, rollouts, unit, place=place).tensors for place in range(len(totals))]
                for side, totals in ((Side.FUNCTIONAL, x_totals), (Side.UPDATE, y_sums))
            )
            for of_update, g_unit, y_sum in zip(dots, g_units, y_sums, strict=True):
                for own, x_unit, x_sum in zip(of_update, x_units, x_totals, strict=True):
                    own[number] = unit_dots(context, x_unit, g_unit, x_sum, y_sum)
            for steps, g_unit in zip(along, g_units, strict=False):
                x_stacks = [[x.unsqueeze(0) for x in x_unit] for x_unit in x_units]
                steps.add([number], x_stacks, [g.unsqueeze(0) for g in g_unit], torch.tensor([len(unit)]))
            if context.run.full_kernel:
                y_unit = context.step.apply_preconditioner(g_units[0])
                kept.append(([x.cpu() for x in x_units[0]], [y.cpu() for y in y_unit]))
            context.report("diagonal", unit[-1] + 1, rollouts.n_prompts)
        add_up(context.team, [dots])
        found = [
            [
                sums_of_dots(own, parameter_products(x_sum, y_sum), sizes)
                for own, x_sum in zip(of_update, x_totals, strict=True)
            ]
            for of_update, y_sum in zip(dots, y_sums, strict=True)
        ]
        if context.run.full_kernel:
            found[0][0] = dataclasses.replace(found[0][0], kernel=kernel_between(share, kept, context.registry.tensors))
        found = with_rows(found, along, context.layout)
        return measured_of(context, found, sums, (x_pass, y_pass), "then both again for every unit")

    def totals_after_first(self, side: Side, share: Share) -> Iterator[tuple[int, GradientSum]]:
        """Place and raw sum of every column of a side after the first, over all ranks' prompts."""
        for place in range(1, len(self.context.columns.of_side(side))):
            yield place, self._whole_sum(side, share, place=place)

    def _projections(
        self,
        side: Side,
        share: Share,
        direction: Sequence[Tensor],
        place: int = 0,
        along: Sequence[AlongSums] = (),
    ) -> Tensor:
        """[B] inner products of every prompt's X_n (or Y_n) with a direction, and with steps ``along``, a backward a prompt."""
        rollouts = share.rollouts
        products = torch.zeros(rollouts.n_prompts, dtype=torch.float64)
        self.context.team.enter(f"{side.value} per prompt")
        asked = rollouts, self._column(side, place), share.prompts
        kept = {"products": Tables({"products": products})} | {f"along {n}": own for n, own in enumerate(along)}
        for prompt in kept_steps(self.context, f"{side.value} per prompt", asked, kept, share.prompts):
            gradient = self._gradient_sum(side, rollouts, [prompt], place=place).tensors
            for steps in along:
                x_stacks: list[list[Tensor | None]] = [
                    [None] * len(gradient) for _ in self.context.columns.of_side(side)
                ]
                x_stacks[place] = [x.unsqueeze(0) for x in gradient]
                steps.add([prompt], x_stacks, None, torch.ones(1))
            if side is Side.UPDATE:
                gradient = self.context.step.apply_preconditioner(gradient)
            products[prompt] = inner_product(gradient, direction)
            self.context.report(f"{side.value} per prompt", prompt + 1, rollouts.n_prompts)
        add_up(self.context.team, [products])
        return products

    def _both_passes(self, entropy: Share, update: Share) -> tuple[Pass, Pass]:
        """X first: what it reached is said where the update's route reaches nothing."""
        x_pass = self._pass(Side.FUNCTIONAL, entropy)
        if not any(x_pass.total.touched):
            coverage_of(self.context, Side.FUNCTIONAL, x_pass.total, entropy.rollouts)
        return x_pass, self._pass(Side.UPDATE, update, x_pass.total.touched)

    def _pass(self, side: Side, share: Share, x_touched: Sequence[bool] | None = None) -> Pass:
        """The sum over a whole batch, and what was learned of its sequences."""
        columns, rollouts = self._column(side, 0), share.rollouts
        table = SequenceTable.of(rollouts.n_sequences, columns, ratios=rollouts.old_logprobs is not None)
        return Pass(self._whole_sum(side, share, table, x_touched), table)

    def _whole_sum(
        self,
        side: Side,
        share: Share,
        table: SequenceTable | None = None,
        x_touched: Sequence[bool] | None = None,
        *,
        place: int = 0,
    ) -> GradientSum:
        """See `_gradient_sum`: over the prompts of all ranks."""
        team = self.context.team
        team.enter(side.value)
        total = self._gradient_sum(side, share.rollouts, share.prompts, table, x_touched, place=place, keeps=True)
        add_up(team, total.tensors)
        total.touched[:] = any_of(team, total.touched)
        if table is not None:
            share.fill(table.known)
        return total

    def _gradient_sum(
        self,
        side: Side,
        rollouts: Rollouts,
        prompts: Sequence[int],
        table: SequenceTable | None = None,
        x_touched: Sequence[bool] | None = None,
        *,
        place: int = 0,
        keeps: bool = False,
    ) -> GradientSum:
        """Σ X_n or Σ g_n (raw) over the given prompts: a fresh forward and one backward per microbatch.

        Of the column at ``place`` among those of its side. With a ``table`` (the pass over the whole batch) what is learned of
        every sequence is written into it. ``keeps`` for a pass that a later process may go on with.
        """
        context, columns = self.context, self._column(side, place)
        total = GradientSum.zeros(context.registry.tensors, context.sums_device)
        microbatches = self._iter_prompt_microbatches(rollouts, prompts)
        if keeps:
            asked = rollouts, columns, (list(prompts), table is None)
            microbatches = kept_steps(context, side.value, asked, {"sum": total, **tables_of(table)}, microbatches)
        with context.probe_state():
            if side is Side.UPDATE:
                # Every pass starts from the caller's random state. One draw more before Y, so that randomness nobody
                # switched off differs from that of X and `check_repeatable` sees it.
                torch.rand(1, device=context.device)
            for rows in microbatches:
                forward = self._compute_aligned_batch_logprobs(rollouts, rows)
                scored = forward.scored_tokens(rollouts, rows)
                coefficients = columns.weigh(scored)
                scale = power_of_two_scale(coefficients.largest(0))
                loss = self._build_probe_loss(forward, coefficients) * scale
                total.add(gradients_by_route(context, side, loss, forward.sequence_logprobs, x_touched), scale)
                if table is not None:
                    table.put(rows, scored.sequence_logprobs, coefficients)
                    done = list(prompts).index(int(rollouts.prompt_index[rows[-1]])) + 1
                    context.report(side.value, done, rollouts.n_prompts)
        return total

    def _column(self, side: Side, place: int) -> Columns:
        return Columns((self.context.columns.of_side(side).members[place],))
