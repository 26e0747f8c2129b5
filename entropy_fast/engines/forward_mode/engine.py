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
from entropy_fast.columns.coefficients import Coefficients
from entropy_fast.columns.token_coefficients import ScoredTokens, coefficients_of
from entropy_fast.engines.forward_mode import ForwardWithTangents
from entropy_fast.engines.forward_mode.agreement import check_against_reverse_mode, scaled_direction
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.estimates.directional_derivatives import DirectionalDerivatives
from entropy_fast.estimates.kernel_sums import CrossKernelSums
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.ways.padded import pack_rows

__all__ = ["ForwardModeEngine"]


class ForwardModeEngine:
    """Two-batch kernel sums for the components of a probe, by derivatives along Y_sum.

    Args:
        components: model, geometry, options and guards.
    """

    name = "jvp"

    def __init__(self, components: ProbeComponents) -> None:
        self._components = components
        self._forward: ForwardWithTangents | None = None

    @property
    def plan(self) -> str | None:
        """How the entropy batch was gone through, in words; None before it was."""
        if self._forward is None:
            return None
        return f"update batch by one backward, entropy batch by forwards with tangents; {self._forward.plan}"

    @property
    def notes(self) -> list[str]:
        """What the result should say."""
        said = [
            "engine 'jvp' does not form X_sum: shares of update prompts, v_x_plus_v_y and the norm of the entropy gradient are "
            "not known, and which parameters the entropy gradient reaches was seen for one prompt."
        ]
        if self._components.config.conditional_variance == "alpha":
            said.append("conditional_variance is an option of the two-pass engine; it was not used.")
        return said

    def cross_sums(self, entropy: Rollouts, update: Rollouts) -> CrossKernelSums:
        """Row sums X_n · Y_sum and their total; column sums stay unknown.

        Raises:
            GradientCoverageError: no parameter received a gradient, or too much of it has no second moment.
            ForwardDerivativeError: an operation of the model has no forward derivative, or a wrong one.
            ModelStateError: two forwards of the same sequences differ.
        """
        assert_grad_context("ForwardModeEngine.cross_sums")
        components = self._components
        y_sum = components.accumulate_sum_Y(update)
        with components.probe_state():
            first = entropy.rows_of_prompt(0)
            packed = pack_rows(entropy, first[:1], components.device)
            self._forward = ForwardWithTangents(
                components.registry.module, components.registry.tensors, components.autocast, packed
            )
            check_against_reverse_mode(components, entropy, first, y_sum.tensors)
            return self._sweep(self._forward, entropy, y_sum, update.n_prompts)

    def _sweep(
        self, forward: ForwardWithTangents, rollouts: Rollouts, y_sum: GradientSum, n_update: int
    ) -> CrossKernelSums:
        """All of E, every microbatch by one forward. ``y_sum`` is scaled in place and of no use afterwards."""
        components = self._components
        direction, scale = scaled_direction(y_sum.tensors, components.registry.tensors)
        table = components.new_table("X", rollouts)
        config, largest = components.config, 0.0
        tokens, parts = (torch.zeros(rollouts.input_ids.shape, dtype=torch.float64) for _ in range(2))
        entropies = torch.zeros_like(tokens) if config.wants_token_entropies else None
        for rows in components._iter_prompt_microbatches(rollouts):
            components.registry.check("ForwardModeEngine")
            batch = pack_rows(rollouts, rows, components.device)
            found = forward.run(batch, direction, want_entropies=config.wants_token_entropies)
            coefficients = coefficients_of(config, rollouts, rows, ScoredTokens.of(found.values), "X")
            table.put(rows, found.values.sequence_logprobs, coefficients)
            scored = _scored(rollouts, rows)
            of_tokens = found.tokens[found.values.scored].double() / scale
            of_entropies = None if found.entropies is None else found.entropies[found.values.scored].double() / scale
            own = _parts(coefficients, batch.loss_mask.sum(1), of_tokens, of_entropies)
            for kept, values in ((tokens, of_tokens), (entropies, of_entropies), (parts, own)):
                if kept is not None and values is not None:
                    kept[rows] = kept[rows].masked_scatter(scored, values.cpu())
            largest = max(largest, float(coefficients.largest(0).max()))
            components.report("X", int(rollouts.prompt_index[rows].max()) + 1, rollouts.n_prompts)
        projections = torch.zeros(rollouts.n_prompts, dtype=torch.float64)
        projections.index_add_(0, rollouts.prompt_index, parts.sum(1))
        if not largest:
            # Then X_sum is known: it is 0.
            components.coverage["X"] = dataclasses.replace(components.coverage["X"], norm=0.0)
        return CrossKernelSums(
            x_dot_y=float(projections.sum()),
            row_sums=projections,
            column_sums=None,
            derivatives=DirectionalDerivatives(
                sequences=tokens.sum(1) / n_update,
                tokens=tokens.div_(n_update),
                token_shares=parts.mul_(components.preconditioner.learning_rate / (n_update * rollouts.n_prompts)),
                entropies=None if entropies is None else entropies.div_(n_update),
            ),
        )


def _parts(coefficients: Coefficients, lengths: Tensor, of_tokens: Tensor, of_entropies: Tensor | None) -> Tensor:
    """[M] every response token's part in its prompt's X_n · Y_sum."""
    if coefficients.tokens is None:
        return coefficients.entropy.repeat_interleave(lengths) * of_tokens
    of_logprob, of_entropy = coefficients.tokens.of(0)
    parts = of_logprob * of_tokens
    if of_entropy is not None:
        assert of_entropies is not None
        parts = parts + of_entropy * of_entropies
    return parts


def _scored(rollouts: Rollouts, rows: Tensor) -> Tensor:
    """[n, T] bool, the response tokens of the given rows in the rollouts' own columns."""
    return ((rollouts.loss_mask[rows.to(rollouts.loss_mask.device)] == 1).cpu()) & (
        (rollouts.attention_mask[rows.to(rollouts.attention_mask.device)] == 1).cpu()
    )
