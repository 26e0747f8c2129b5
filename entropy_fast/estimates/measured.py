"""Everything an engine found, in one object, which estimates are made from. An engine writes nothing elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from entropy_fast.checks.coverage import PassCoverage
from entropy_fast.columns import SequenceTable
from entropy_fast.estimates.kernel_sums import KernelSums
from entropy_fast.step import ExcludedElements

__all__ = ["GradientAgreement", "Measured", "Plan", "UpdateSums"]


@dataclasses.dataclass(frozen=True)
class GradientAgreement:
    """How the gradient that stands in ``.grad`` compares with what the rollouts' own coefficients make of them.

    Attributes:
        cosine: of the live gradient and the sampled prompts' sum. It is below 1 by the sampling where not all prompts were
            taken; well below it the loss is another one: a KL term, other masks, advantages or weights.
        scale: the live gradient in units of theirs: 1 where the loss is theirs, below it by clipping; another number is a loss
            scale, or another averaging. NaN where the sampled prompts have no gradient.
        prompts: that were sampled.
        of: prompts of the batch.
    """

    cosine: float
    scale: float
    prompts: int
    of: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an engine went through the batches.

    Attributes:
        way: in words.
        not_taken: for every faster way its name and the reason against it.
        reasons: why things were done as they were.
    """

    way: str
    not_taken: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ". ".join(part.rstrip(".") for part in (self.way, "; ".join(self.reasons), self.refusals) if part) + "."

    @property
    def refusals(self) -> str:
        """What was not taken, and why, in a sentence; empty where nothing was."""
        return f"Not taken: {'; '.join(self.not_taken)}" if self.not_taken else ""


@dataclasses.dataclass(frozen=True)
class UpdateSums:
    """Sums over the influence kernels of one update.

    Attributes:
        sums: with the functional whose change is forecast.
        apart: with every other functional, by its name.
    """

    sums: KernelSums
    apart: Mapping[str, KernelSums]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an engine found in one batch or two. Mappings have the keys ``entropy`` and ``update``: a pass for each side.

    Attributes:
        sums: over the influence kernel.
        coverage: what each side's gradient reached.
        sequences: what is known of every sequence of each side's batch.
        excluded: elements without a usable second moment.
        leading_products: X_sum · Y_sum of the first few parameters, by name; empty where X_sum was not formed.
        plan: how the batches were gone through.
        apart: likewise sums, with the same update, of every functional column after the first, by its name.
        candidates: likewise those with every update after the first, by its name.
        notes: what deserves a sentence in the result.
        agreement: of a live gradient with the rollouts' own; None where there is no live one.
    """

    sums: KernelSums
    coverage: Mapping[str, PassCoverage]
    sequences: Mapping[str, SequenceTable]
    excluded: ExcludedElements
    leading_products: Mapping[str, float]
    plan: Plan
    notes: tuple[str, ...] = ()
    apart: Mapping[str, KernelSums] = dataclasses.field(default_factory=dict)
    candidates: Mapping[str, UpdateSums] = dataclasses.field(default_factory=dict)
    agreement: GradientAgreement | None = None
