"""The forward-mode engine: the two-batch estimate from one backward of the update batch and one forward of the entropy batch.

Legend (docs/theory.md): S_i sequence log-prob, s_it that of token t, c_i entropy coefficient, X_n = Σ_{i in n} c_i ∇S_i,
Y_sum the sum of preconditioned update gradients, Ȳ = Y_sum / B_U, E entropy batch (B_E prompts), U update batch (B_U prompts).

Forward mode gives every S'_i = ∇S_i · Y_sum in the forward that gives S_i, so X_n · Y_sum = Σ_i c_i S'_i needs no backward, no
graph and no memory that grows with the number of layers. It does not form X_sum: what the update batch's prompts contribute is
not known.
"""

from __future__ import annotations

import dataclasses

import torch

from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.columns import SequenceTable, Side
from entropy_fast.context import ProbeContext
from entropy_fast.distributed.collectives import any_of
from entropy_fast.distributed.dealing import Share, share_of
from entropy_fast.engines.forward_mode.agreement import check_against_reverse_mode, scaled_direction
from entropy_fast.engines.forward_mode.forward import ForwardWithTangents
from entropy_fast.engines.forward_mode.token_parts import forward_of, token_parts
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.resolving import resolved_context
from entropy_fast.engines.sums import by_column, finish_update
from entropy_fast.engines.two_pass.engine import ProbeComponents
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.directional_derivatives import DirectionalDerivatives
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured, Plan
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import iter_microbatches, prompt_units

__all__ = ["ForwardModeEngine"]


class ForwardModeEngine:
    """Two-batch kernel sums by derivatives along Y_sum.

    Args:
        context: of the probe.
    """

    def __init__(self, context: ProbeContext) -> None:
        self._context = context

    def same_batch(self, rollouts: Rollouts) -> Measured:
        """Not to be had.

        Raises:
            ConfigError: always: there is no diagonal.
        """
        raise ConfigError(f"engine 'jvp': {NO_DIAGONAL}.", fix="pass entropy_rollouts, or use engine='one_pass'.")

    def two_batch(self, entropy: Rollouts, update: Rollouts) -> Measured:
        """See `Engine.two_batch`: row sums X_n · Y_sum and their total; column sums stay unknown.

        Raises:
            ForwardDerivativeError: an operation of the model has no forward derivative, or a wrong one.
        """
        assert_grad_context("ForwardModeEngine.two_batch")
        reference = ProbeComponents.of(self._context)
        self._context = reference.context = context = resolved_context(self._context, entropy, update, reference.score)
        share, update_share = (share_of(context.team, b, prompt_units(b.n_prompts, None)) for b in (entropy, update))
        y_pass = reference._pass(Side.UPDATE, update_share)
        y_sum, y_coverage, excluded = finish_update(context, y_pass.total, update)
        others = [total for _, total in reference.totals_after_first(Side.UPDATE, update_share)]
        with context.probe_state():
            first = entropy.rows_of_prompt(0)
            forward = forward_of(context, entropy)
            x_coverage = check_against_reverse_mode(context, entropy, first, y_sum.tensors)
            sums, table, silent = self._sweep(forward, share, y_sum, update.n_prompts)
            found_by_update = [sums]
            for total in others:
                y_sum = finish_update(context, total, update)[0]
                found_by_update.append(self._sweep(forward, share, y_sum, update.n_prompts)[0])
        own, apart, candidates = by_column(context.columns, found_by_update)
        if silent:
            # Then X_sum is known: it is 0.
            x_coverage = dataclasses.replace(x_coverage, norm=0.0)
        return Measured(
            own,
            {Side.FUNCTIONAL.value: x_coverage, Side.UPDATE.value: y_coverage},
            {Side.FUNCTIONAL.value: table, Side.UPDATE.value: y_pass.table},
            excluded,
            {},
            Plan(f"update batch by one backward, entropy batch by forwards with tangents; {forward.plan}"),
            (
                "engine 'jvp' does not form X_sum: shares of update prompts, v_x_plus_v_y and the norm of the entropy gradient "
                "are not known, and which parameters the entropy gradient reaches was seen for one prompt.",
            ),
            apart,
            candidates,
        )

    def _sweep(
        self, forward: ForwardWithTangents, share: Share, y_sum: GradientSum, n_update: int
    ) -> tuple[list[KernelSums], SequenceTable, bool]:
        """Every functional column over all of E, a forward a microbatch; and whether the first one's coefficients are 0.

        ``y_sum`` is scaled in place and of no use afterwards.
        """
        context, columns = self._context, self._context.columns.of_side(Side.FUNCTIONAL)
        rollouts, prompts = share.rollouts, share.prompts
        context.team.enter("entropy")
        direction, scale = scaled_direction(y_sum.tensors, context.registry.tensors)
        table = SequenceTable.of(rollouts.n_sequences, columns, ratios=rollouts.old_logprobs is not None)
        largest = 0.0
        tokens = torch.zeros(rollouts.input_ids.shape, dtype=torch.float64)
        parts = [torch.zeros_like(tokens) for _ in columns]
        entropies = torch.zeros_like(tokens) if columns.needs_entropies else None
        for rows in iter_microbatches(rollouts, prompts, context.run.prompts_per_microbatch or 1):
            found = token_parts(context, forward, columns, rollouts, rows, direction, scale)
            table.put(rows, found.scored.sequence_logprobs, found.coefficients)
            for kept, values in (
                (tokens, found.logprobs),
                (entropies, found.entropies),
                *zip(parts, found.parts, strict=True),
            ):
                if kept is not None and values is not None:
                    found.put(kept, values)
            largest = max(largest, float(found.coefficients.largest(0).max()))
            context.report("entropy", int(rollouts.prompt_index[rows].max()) + 1, rollouts.n_prompts)
        share.fill([*table.known, tokens, *parts, *([] if entropies is None else [entropies])])
        (weighs,) = any_of(context.team, [largest > 0])
        derivatives = DirectionalDerivatives(
            sequences=tokens.sum(1) / n_update,
            tokens=tokens.div_(n_update),
            token_shares=parts[0] * (context.step.learning_rate / (n_update * rollouts.n_prompts)),
            entropies=None if entropies is None else entropies.div_(n_update),
        )
        sums = []
        for place, by_token in enumerate(parts):
            projections = torch.zeros(rollouts.n_prompts, dtype=torch.float64)
            projections.index_add_(0, rollouts.prompt_index, by_token.sum(1))
            known = None if place else derivatives
            sums.append(KernelSums(float(projections.sum()), projections, None, derivatives=known, by_token=by_token))
        return sums, table, not weighs


NO_DIAGONAL = (
    "it has derivatives along the sum of all updates; the same-batch estimate takes out every prompt's product with its own "
    "update, the diagonal K_nn, which needs each Y_n by itself"
)
