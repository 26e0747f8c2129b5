"""What an engine hands to statistics: sums over the influence kernel K_nm = X_n · Y_m.

Legend: B prompts, M units (prompts, or blocks of prompts), X_u and Y_u the unit's entropy gradient and preconditioned
update gradient, X_sum and Y_sum their sums over units; with two batches, X of B_E entropy prompts and Y of B_U update prompts.
S_i log-prob of sequence i, c_i and a_i its coefficients, V and W what its gradient meets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from entropy_fast.estimates.directional_derivatives import DirectionalDerivatives

__all__ = ["AlongStep", "KernelSums", "SampledUpdate", "SequenceParts"]


@dataclasses.dataclass(frozen=True)
class SampledUpdate:
    """How products with a step vary with the prompts that the update was sampled from; fp64 on the CPU.

    Attributes:
        projections: [M] y_u, what each sampled unit's update does to the others' numbers beyond the sample's mean.
        share: of the update's batch that was sampled; 1 where it is all of it, and then nothing varies.
    """

    projections: Tensor
    share: float

    def less(self, other: SampledUpdate) -> SampledUpdate:
        """Of X - X' with the same step."""
        return SampledUpdate(self.projections - other.projections, self.share)


@dataclasses.dataclass(frozen=True)
class AlongStep:
    """Products of units' gradients with parts of the optimizer's step Δθ, learning rate and signs included; fp64 on the CPU.

    Attributes:
        rows: by part, [parameters, M] X_u · Δθ^part where Δθ is that of the other units' samples (with two batches, of the
            update batch). Without ``fresh`` where the kernel has that part.
        whole: by part, X_sum · Δθ^part of the whole batch.
        sampled: where the update itself is known from a sample alone; None elsewhere.
    """

    rows: Mapping[str, Tensor]
    whole: Mapping[str, float]
    sampled: SampledUpdate | None = None

    def less(self, other: AlongStep) -> AlongStep:
        """Products of X - X' with the same step."""
        return AlongStep(
            {part: rows - other.rows[part] for part, rows in self.rows.items()},
            {part: value - other.whole[part] for part, value in self.whole.items()},
            None if self.sampled is None or other.sampled is None else self.sampled.less(other.sampled),
        )


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
    """Sums of K over units, all fp64 on the CPU: K [M, M] of one batch, or K [B_E, B_U] between two.

    Attributes:
        x_dot_y: X_sum · Y_sum.
        row_sums: [M] or [B_E] X_u · Y_sum.
        column_sums: [M] or [B_U] Y_u · X_sum; None where X_sum was not formed.
        diagonal: [M] K_uu; None with two batches.
        unit_sizes: [M] prompts per unit; None with two batches.
        kernel: [M, M], None when it was not kept.
        by_parameter: [number of parameters] every parameter's part of X_sum · Y_sum, less that of Σ K_uu with one batch, in
            registry order; None where the engine did not take it apart.
        by_sequence: every sequence's part of the same; None where it was not asked for.
        derivatives: what the engine knows of every sequence and token; None where it knows sums alone.
        by_token: [N, T] every response token's part in X_sum · Y_sum, less that of Σ K_uu with one batch: (c_t ∇s_t + e_t ∇H_t)
            along what its prompt meets; in the columns of the entropy batch. None where it was not asked for.
        along: with the parts of the optimizer's whole step; None under ``adam_static``. Then ``by_sequence.entropy`` and
            ``by_token`` are along that step, and add up to the sum of all its rows and of the fresh part.
        clip: what clipping multiplies the update's gradient by.
    """

    x_dot_y: float
    row_sums: Tensor
    column_sums: Tensor | None
    diagonal: Tensor | None = None
    unit_sizes: Tensor | None = None
    kernel: Tensor | None = None
    by_parameter: Tensor | None = None
    by_sequence: SequenceParts | None = None
    derivatives: DirectionalDerivatives | None = None
    by_token: Tensor | None = None
    along: AlongStep | None = None
    clip: float = 1.0

    def less(self, other: KernelSums) -> KernelSums:
        """Sums of the kernel of X - X', whose X' with the same Y has the sums ``other``."""

        def difference(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else mine - theirs

        mine, theirs = self.by_sequence, other.by_sequence
        parts = None
        if mine is not None and theirs is not None:
            parts = SequenceParts(mine.entropy - theirs.entropy, mine.update - theirs.update)
        return KernelSums(
            self.x_dot_y - other.x_dot_y,
            self.row_sums - other.row_sums,
            difference(self.column_sums, other.column_sums),
            difference(self.diagonal, other.diagonal),
            self.unit_sizes,
            difference(self.kernel, other.kernel),
            difference(self.by_parameter, other.by_parameter),
            parts,
            by_token=difference(self.by_token, other.by_token),
            along=None if self.along is None or other.along is None else self.along.less(other.along),
            clip=self.clip,
        )
