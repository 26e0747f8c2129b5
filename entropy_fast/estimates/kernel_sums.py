"""What an engine hands to statistics: sums over the influence kernel K_nm = X_n · Y_m.

Legend: B prompts, M units (prompts, or blocks of prompts), X_u and Y_u the unit's entropy gradient and preconditioned
update gradient, X_sum and Y_sum their sums over units; S_i log-prob of sequence i, c_i and a_i its coefficients, V and W what
its gradient meets (`entropy_fast.engines.one_pass.by_sequence`).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from entropy_fast.estimates.directional_derivatives import DirectionalDerivatives

__all__ = ["CrossKernelSums", "KernelSums", "SequenceParts"]


@dataclasses.dataclass(frozen=True)
class SequenceParts:
    """Parts of X_sum · Y_sum - Σ_u K_uu (one batch) or of X_sum · Y_sum (two), by sequence; fp64 on the CPU.

    Attributes:
        entropy: [N] c_i ∇S_i · V, of the entropy batch; they add up to that.
        update: [N] a_i ∇S_i · W, of the update batch, likewise.
    """

    entropy: Tensor
    update: Tensor


@dataclasses.dataclass(frozen=True)
class KernelSums:
    """One batch: sums of K [M, M] over units, all fp64 on the CPU.

    Attributes:
        x_dot_y: X_sum · Y_sum.
        diagonal: [M] K_uu.
        row_sums: [M] Σ_m K_um = X_u · Y_sum.
        column_sums: [M] Σ_n K_nu = Y_u · X_sum.
        unit_sizes: [M] prompts per unit.
        kernel: [M, M], None when it was not kept.
        by_parameter: [number of parameters] every parameter's part of X_sum · Y_sum - Σ K_uu, in registry order; None where
            the engine did not take it apart.
        by_sequence: every sequence's part of the same; None where it was not asked for.
    """

    x_dot_y: float
    diagonal: Tensor
    row_sums: Tensor
    column_sums: Tensor
    unit_sizes: Tensor
    kernel: Tensor | None = None
    by_parameter: Tensor | None = None
    by_sequence: SequenceParts | None = None


@dataclasses.dataclass(frozen=True)
class CrossKernelSums:
    """Two batches: K [B_E, B_U] between entropy prompts and update prompts, all fp64 on the CPU.

    Attributes:
        x_dot_y: X_sum · Y_sum.
        row_sums: [B_E] X_n · Y_sum.
        column_sums: [B_U] Y_m · X_sum; None where X_sum was not formed.
        by_parameter: [number of parameters] every parameter's part of X_sum · Y_sum; None as above.
        derivatives: what the engine knows of every sequence and token; None where it knows sums alone.
        by_sequence: every sequence's part of X_sum · Y_sum; None where it was not asked for.
    """

    x_dot_y: float
    row_sums: Tensor
    column_sums: Tensor | None
    by_parameter: Tensor | None = None
    derivatives: DirectionalDerivatives | None = None
    by_sequence: SequenceParts | None = None
