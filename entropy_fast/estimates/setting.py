"""What a result says about how it came to be, beside what was measured."""

from __future__ import annotations

import dataclasses

import torch

from entropy_fast.columns.entropy import EntropyMeasure
from entropy_fast.config import EstimateOptions, RunOptions

__all__ = ["Setting"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of one probe.

    Attributes:
        engine: its name.
        estimate: what was asked to be estimated.
        run: how it was asked to be run.
        learning_rate: lr.
        geometry: of the step.
        parameters: names, in registry order.
        compute_dtypes: of the parameters and of autocast.
        measure: which entropy is meant.
        notes: what the optimizer's state wants said.
        linear: whether a part of the step is linear in the gradient, so that the influence kernel is of something.
    """

    engine: str
    estimate: EstimateOptions
    run: RunOptions
    learning_rate: float
    geometry: str
    parameters: tuple[str, ...]
    compute_dtypes: frozenset[torch.dtype]
    measure: EntropyMeasure
    notes: tuple[str, ...] = ()
    linear: bool = True
