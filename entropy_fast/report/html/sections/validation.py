"""What the step really did: taken, looked at and put back, beside its forecast."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from entropy_fast.report.html.numbers import plain, signed, with_error
from entropy_fast.report.text import printable
from entropy_fast.report.validation import summary
from entropy_fast.truth import RealisedChange, Validation

__all__ = ["ValidationRow", "ValidationView", "validation_views"]

NAME = 200


@dataclasses.dataclass(frozen=True)
class ValidationRow:
    """One multiple of the step."""

    eta: str
    forecast: str
    halved: str
    ratio: str
    one_way: str
    second_order: str
    total_forecast: str
    total: str
    ess: str


@dataclasses.dataclass(frozen=True)
class ValidationView:
    """One run's.

    Attributes:
        name: of the run.
        summary: in sentences.
        unit: of the changes.
        rows: by multiple of the step.
        with_total: whether held-out responses gave the total.
    """

    name: str
    summary: str
    unit: str
    rows: tuple[ValidationRow, ...]
    with_total: bool


def validation_views(found: Mapping[str, Validation]) -> tuple[ValidationView, ...]:
    """By run."""
    return tuple(_view(name, one) for name, one in found.items())


def _view(name: str, found: Validation) -> ValidationView:
    with_total = any(not math.isnan(point.total) for point in found.points)
    rows = tuple(_row(point, found) for point in found.points)
    return ValidationView(
        printable(name, NAME), printable(summary(found), 2000).replace(" %", "\u00a0%"), found.unit, rows, with_total
    )


def _row(point: RealisedChange, found: Validation) -> ValidationRow:
    direct, total, error = found.forecast
    forecast = direct * point.eta
    ratio = "below rounding" if point.below_floor or not forecast else f"{point.symmetric.direct / forecast:.4f}"
    known = not math.isnan(point.total)
    return ValidationRow(
        f"{point.eta:g}",
        signed(forecast, 4),
        signed(point.symmetric.direct, 4),
        ratio,
        signed(point.direct, 4),
        signed(point.second_order, 2),
        with_error(total * point.eta, error * point.eta) if known else "",
        with_error(point.total, point.total_std_error) if known else "",
        f"{point.ess:.0%}" if known and not math.isnan(point.ess) else plain(math.nan) if known else "",
    )
