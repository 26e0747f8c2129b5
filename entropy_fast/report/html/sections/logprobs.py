"""How far the policy's log-probs are from those that the rollouts were sampled with, sequence by sequence."""

from __future__ import annotations

import dataclasses

import torch

from entropy_fast.estimates.notes import OFF_POLICY
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.html.numbers import plain

__all__ = ["LogprobsSection", "OffRow", "logprobs_section"]

MOST = 20  # rows that are named
BATCHES = {"entropy": "entropy batch", "update": "update batch"}


@dataclasses.dataclass(frozen=True)
class OffRow:
    """One sequence: its row in the rollouts, and how far its log-probs are off, in nats a token."""

    batch: str
    row: int
    mean: str
    largest: str
    clipped: str


@dataclasses.dataclass(frozen=True)
class LogprobsSection:
    """Of a result whose rollouts have ``old_logprobs``.

    Attributes:
        rows: sequences beyond ``limit``, the farthest first; more: how many further ones there are.
        of: sequences that were looked at.
        limit: mean distance from which a sequence is named, nats a token.
        mean: of all sequences; largest: of any token.
    """

    rows: tuple[OffRow, ...]
    more: int
    of: int
    limit: str
    mean: str
    largest: str


def logprobs_section(result: DeltaH1Result) -> LogprobsSection | None:
    """None where the rollouts have no ``old_logprobs``."""
    rows: list[tuple[float, OffRow]] = []
    distances, largest = [], []
    one_batch = result.estimate == "same_batch"
    for name, table in result.sequences.items():
        if table.ratios is None or (one_batch and name != "update"):
            continue
        numbers = _rows(result, "rollouts" if one_batch else name, len(table.ratios.mean_log_ratio))
        batch = "" if one_batch else BATCHES.get(name, name)
        found = zip(numbers, *(vars(table.ratios)[key].tolist() for key in vars(table.ratios)), strict=True)
        for row, mean, most, clipped in found:
            distances.append(mean)
            largest.append(most)
            shown = OffRow(batch, row, plain(mean), plain(most), f"{clipped:.0%}" if clipped == clipped else "")
            rows.append((mean, shown))
    if not rows:
        return None
    off = sorted((item for item in rows if item[0] > OFF_POLICY), key=lambda item: -item[0])
    return LogprobsSection(
        tuple(row for _, row in off[:MOST]),
        max(0, len(off) - MOST),
        len(rows),
        plain(OFF_POLICY, 1),
        plain(float(torch.tensor(distances, dtype=torch.float64).mean())),
        plain(max(largest)),
    )


def _rows(result: DeltaH1Result, batch: str, count: int) -> list[int]:
    """Rows in the rollouts of the sequences that were not left out."""
    report = result.diagnostics.empty_responses.get(batch)
    left_out = set() if report is None else set(report.sequences)
    return [row for row in range(count + len(left_out)) if row not in left_out]
