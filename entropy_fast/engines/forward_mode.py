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

from entropy_fast.engines.coefficients import length_weights, sequence_coefficients
from entropy_fast.engines.directional_derivatives import DirectionalDerivatives
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.kernel_sums import CrossKernelSums
from entropy_fast.engines.tangents import ForwardWithTangents
from entropy_fast.engines.tangents.agreement import check_against_reverse_mode, scaled_direction
from entropy_fast.guards.grad_context import assert_grad_context
from entropy_fast.probe_components import ProbeComponents
from entropy_fast.rollouts import Rollouts
from entropy_fast.teacher_forcing import pack_rows

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
        weights = length_weights(rollouts, components.config.weighting)
        tokens = torch.zeros(rollouts.input_ids.shape, dtype=torch.float64)
        for rows in components._iter_prompt_microbatches(rollouts):
            components.registry.check("ForwardModeEngine")
            batch = pack_rows(rollouts, rows, components.device)
            found = forward.run(batch, direction)
            coefficients = sequence_coefficients(found.sequence_logprobs, rows, rollouts, weights)
            table.put(rows, found.sequence_logprobs, coefficients)
            scored = _scored(rollouts, rows)
            values = found.tokens[batch.loss_mask[:, 1:] == 1].double().cpu()
            tokens[rows] = tokens[rows].masked_scatter(scored, values / scale)
            components.report("X", int(rollouts.prompt_index[rows].max()) + 1, rollouts.n_prompts)
        along_sum = tokens.sum(1)
        projections = torch.zeros(rollouts.n_prompts, dtype=torch.float64)
        projections.index_add_(0, rollouts.prompt_index, table.entropy * along_sum)
        if not bool(table.entropy.any()):
            # Then X_sum is known: it is 0.
            components.coverage["X"] = dataclasses.replace(components.coverage["X"], norm=0.0)
        return CrossKernelSums(
            x_dot_y=float(projections.sum()),
            row_sums=projections,
            column_sums=None,
            derivatives=DirectionalDerivatives(
                sequences=along_sum / n_update,
                tokens=tokens / n_update,
                weights=components.preconditioner.learning_rate * table.entropy / rollouts.n_prompts,
            ),
        )


def _scored(rollouts: Rollouts, rows: Tensor) -> Tensor:
    """[n, T] bool, the response tokens of the given rows in the rollouts' own columns."""
    return ((rollouts.loss_mask[rows.to(rollouts.loss_mask.device)] == 1).cpu()) & (
        (rollouts.attention_mask[rows.to(rollouts.attention_mask.device)] == 1).cpu()
    )
