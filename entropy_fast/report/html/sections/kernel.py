"""What every prompt's update does to every prompt's entropy, as a heat map in which prompts that act alike stand together."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from entropy_fast.estimates.held import kernel_shares
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.html.heat import HeatMap, heat_map
from entropy_fast.report.html.numbers import signed
from entropy_fast.report.prompt_order import clustered_order

__all__ = ["KernelSection", "Pair", "kernel_section"]

MOST = 128  # prompts that are drawn
PAIRS = 10  # that are named


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the update of one prompt does to the entropy of another; ranks are those of the table of prompts."""

    update: int
    entropy: int
    value: str


@dataclasses.dataclass(frozen=True)
class KernelSection:
    """Of a result whose kernel was kept.

    Attributes:
        figure: rows are prompts whose entropy changes, columns those whose update changes it.
        pairs: those that matter most.
        shown: how many prompts are drawn; of: how many there are.
    """

    figure: HeatMap
    pairs: tuple[Pair, ...]
    shown: int
    of: int


def kernel_section(result: DeltaH1Result) -> KernelSection | None:
    """None where K was not kept, or there are two batches."""
    if result.kernel is None or result.diagonal is None:
        return None
    own = kernel_shares(result).numpy()
    effects = np.nan_to_num(own)
    ranks = np.empty(len(effects), dtype=np.int64)
    ranks[np.argsort([-abs(prompt.delta_h1) for prompt in result.per_prompt], kind="stable")] = np.arange(
        1, len(effects) + 1
    )
    weight = np.abs(effects).sum(0) + np.abs(effects).sum(1)
    chosen = np.sort(np.argsort(-weight, kind="stable")[:MOST])
    order = chosen[clustered_order(own[np.ix_(chosen, chosen)])]
    names = [f"#{ranks[n]}" for n in order]
    figure = heat_map(
        own[np.ix_(order, order)],
        [f"entropy of {name}" for name in names],
        [f"update of {name}" for name in names],
        unit=result.unit,
        title=f"What the updates of {len(order)} prompts (columns) do to the entropy of each (rows)",
    )
    labels = (
        dataclasses.replace(label, text=label.text.rpartition(" ")[2])
        for label in (*figure.row_labels, *figure.column_labels)
    )
    both = tuple(labels)
    half = len(figure.row_labels)
    figure = dataclasses.replace(figure, row_labels=both[:half], column_labels=both[half:])
    return KernelSection(figure, _strongest(effects, ranks), len(order), len(effects))


def _strongest(effects: NDArray[np.float64], ranks: NDArray[np.int64]) -> tuple[Pair, ...]:
    flat = np.argsort(-np.abs(effects), axis=None, kind="stable")[:PAIRS]
    found = []
    for place in flat.tolist():
        row, column = divmod(place, len(effects))
        if effects[row, column] != 0:
            found.append(Pair(int(ranks[column]), int(ranks[row]), signed(float(effects[row, column]))))
    return tuple(found)
