"""What was measured of disjoint prompts of one batch along one step, as if it had been measured at once.

Only rows along the step are of one piece: every chunk's influence kernel is of that chunk.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from entropy_fast.columns import SequenceTable
from entropy_fast.columns.coefficients import RatioTable
from entropy_fast.estimates.kernel_sums import AlongStep, KernelSums
from entropy_fast.estimates.measured import GradientAgreement, Measured

__all__ = ["merged"]


def merged(first: Measured, second: Measured) -> Measured:
    """Both, the first one's units before the second one's."""
    return dataclasses.replace(
        first,
        sums=_sums(first.sums, second.sums),
        sequences={side: _table(table, second.sequences[side]) for side, table in first.sequences.items()},
        apart={name: _sums(sums, second.apart[name]) for name, sums in first.apart.items()},
        notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
        agreement=_agreement(first.agreement, second.agreement),
    )


def _sums(first: KernelSums, second: KernelSums) -> KernelSums:
    assert first.along is not None and second.along is not None
    along = AlongStep(
        {part: torch.cat([rows, second.along.rows[part]], 1) for part, rows in first.along.rows.items()},
        {part: value + second.along.whole[part] for part, value in first.along.whole.items()},
    )
    return KernelSums(
        math.nan,
        torch.cat([first.row_sums, second.row_sums]),
        _both(first.column_sums, second.column_sums),
        _both(first.diagonal, second.diagonal),
        _both(first.unit_sizes, second.unit_sizes),
        along=along,
        clip=first.clip,
    )


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _table(first: SequenceTable, second: SequenceTable) -> SequenceTable:
    ratios = None
    if first.ratios is not None and second.ratios is not None:
        pairs = zip(vars(first.ratios).values(), vars(second.ratios).values(), strict=True)
        ratios = RatioTable(*(torch.cat(pair) for pair in pairs))
    return SequenceTable(
        torch.cat([first.sequence_logprobs, second.sequence_logprobs]),
        torch.cat([first.entropy_sums, second.entropy_sums]),
        {name: torch.cat([own, second.coefficients[name]]) for name, own in first.coefficients.items()},
        ratios,
    )


def _agreement(first: GradientAgreement | None, second: GradientAgreement | None) -> GradientAgreement | None:
    """Of the larger chunk; chunks are too few to be averaged."""
    if first is None or second is None:
        return None
    return first if first.prompts >= second.prompts else second
