"""A forecast beside what a step really did to the same responses."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.truth import Rescored

__all__ = ["print_rescored"]


def print_rescored(result: DeltaH1Result, rescored: Sequence[Rescored], console: Console) -> None:
    """The direct part on this batch, forecast and found, step by step; nothing where the result has no parts."""
    if result.split is None:
        return
    table = Table(title="The same responses scored again after the step: change of their entropy", title_justify="left")
    for column in ("learning rate", "forecast", "found, ± step halved", "ratio", "found, one way"):
        table.add_column(column, justify="right")
    for step in rescored:
        forecast = result.split.on_batch * step.learning_rate / result.learning_rate
        ratio = f"{step.symmetric / forecast:.5f}" if forecast else "unknown"
        cells = (
            f"{step.learning_rate:.3g}",
            f"{forecast:+.6g}",
            f"{step.symmetric:+.6g}",
            ratio,
            f"{step.forward:+.6g}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)
