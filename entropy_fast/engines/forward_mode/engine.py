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
from torch import Tensor

from entropy_fast.checks.grad_context import assert_grad_context
from entropy_fast.columns import Coefficients, SequenceTable, Side
from entropy_fast.context import ProbeContext
from entropy_fast.engines.forward_mode.agreement import check_against_reverse_mode, scaled_direction
from entropy_fast.engines.forward_mode.forward import ForwardWithTangents
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.sums import finish_update
from entropy_fast.engines.two_pass.engine import ProbeComponents
from entropy_fast.errors import ConfigError
from entropy_fast.estimates.directional_derivatives import DirectionalDerivatives
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.estimates.measured import Measured, Plan
from entropy_fast.rollouts import Rollouts
from entropy_fast.rollouts.units import iter_microbatches
from entropy_fast.ways.teacher_forcing import pad_rows

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
        context = self._context
        y_pass = ProbeComponents.of(context)._pass(Side.UPDATE, update)
        y_sum, y_coverage, excluded = finish_update(context, y_pass.total, update)
        with context.probe_state():
            first = entropy.rows_of_prompt(0)
            padded = pad_rows(entropy, first[:1], context.device)
            forward = ForwardWithTangents(context.registry.module, context.registry.tensors, context.autocast, padded)
            x_coverage = check_against_reverse_mode(context, entropy, first, y_sum.tensors)
            found, apart, table, silent = self._sweep(forward, entropy, y_sum, update.n_prompts)
        if silent:
            # Then X_sum is known: it is 0.
            x_coverage = dataclasses.replace(x_coverage, norm=0.0)
        return Measured(
            found,
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
        )

    def _sweep(
        self, forward: ForwardWithTangents, rollouts: Rollouts, y_sum: GradientSum, n_update: int
    ) -> tuple[KernelSums, dict[str, KernelSums], SequenceTable, bool]:
        """All of E, every microbatch by one forward; likewise every other functional; and whether all coefficients are 0.

        ``y_sum`` is scaled in place and of no use afterwards.
        """
        context, columns = self._context, self._context.columns.of_side(Side.FUNCTIONAL)
        direction, scale = scaled_direction(y_sum.tensors, context.registry.tensors)
        table = SequenceTable.of(rollouts.n_sequences, columns, ratios=rollouts.old_logprobs is not None)
        largest, prompts = 0.0, list(range(rollouts.n_prompts))
        tokens, parts = (torch.zeros(rollouts.input_ids.shape, dtype=torch.float64) for _ in range(2))
        entropies = torch.zeros_like(tokens) if columns.needs_entropies else None
        apart = torch.zeros(len(columns), rollouts.n_prompts, dtype=torch.float64)
        for rows in iter_microbatches(rollouts, prompts, context.run.prompts_per_microbatch or 1):
            context.registry.check("ForwardModeEngine")
            batch = pad_rows(rollouts, rows, context.device)
            found = forward.run(batch, direction, want_entropies=columns.needs_entropies)
            scored = found.values.scored_tokens(rollouts, rows)
            coefficients = columns.weigh(scored)
            table.put(rows, scored.sequence_logprobs, scored.entropy_sums, coefficients)
            places = _scored(rollouts, rows)
            of_tokens = found.tokens[found.values.scored].double() / scale
            of_entropies = None if found.entropies is None else found.entropies[found.values.scored].double() / scale
            lengths, prompt = batch.loss_mask.sum(1), rollouts.prompt_index[rows]
            own, *others = (
                _parts(coefficients, place, lengths, of_tokens, of_entropies) for place in range(len(columns))
            )
            for place, other in enumerate(others, 1):
                apart[place].index_add_(0, prompt.repeat_interleave(lengths.cpu()), other.cpu())
            for kept, values in ((tokens, of_tokens), (entropies, of_entropies), (parts, own)):
                if kept is not None and values is not None:
                    kept[rows] = kept[rows].masked_scatter(places, values.cpu())
            largest = max(largest, float(coefficients.largest(0).max()))
            context.report("entropy", int(prompt.max()) + 1, rollouts.n_prompts)
        projections = torch.zeros(rollouts.n_prompts, dtype=torch.float64)
        projections.index_add_(0, rollouts.prompt_index, parts.sum(1))
        derivatives = DirectionalDerivatives(
            sequences=tokens.sum(1) / n_update,
            tokens=tokens.div_(n_update),
            token_shares=parts.mul_(context.step.learning_rate / (n_update * rollouts.n_prompts)),
            entropies=None if entropies is None else entropies.div_(n_update),
        )
        sums = KernelSums(float(projections.sum()), projections, None, derivatives=derivatives)
        sums_apart = {
            column.name: KernelSums(float(own.sum()), own, None)
            for column, own in list(zip(columns, apart, strict=True))[1:]
        }
        return sums, sums_apart, table, not largest


NO_DIAGONAL = (
    "it has derivatives along the sum of all updates; the same-batch estimate takes out every prompt's product with its own "
    "update, the diagonal K_nn, which needs each Y_n by itself"
)


def _parts(
    coefficients: Coefficients, column: int, lengths: Tensor, of_tokens: Tensor, of_entropies: Tensor | None
) -> Tensor:
    """[M] every response token's part in its prompt's X_n · Y_sum, of one column."""
    if not coefficients.by_token(column):
        return coefficients.by_sequence[column].repeat_interleave(lengths) * of_tokens
    own, parts = coefficients.columns[column], torch.zeros_like(of_tokens)
    for weights, derivatives in ((own.of_logprob, of_tokens), (own.of_entropy, of_entropies)):
        if weights is not None:
            assert derivatives is not None
            parts = parts + weights * derivatives
    return parts


def _scored(rollouts: Rollouts, rows: Tensor) -> Tensor:
    """[n, T] bool, the response tokens of the given rows in the rollouts' own columns."""
    return ((rollouts.loss_mask[rows.to(rollouts.loss_mask.device)] == 1).cpu()) & (
        (rollouts.attention_mask[rows.to(rollouts.attention_mask.device)] == 1).cpu()
    )
