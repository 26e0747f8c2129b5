"""What became of a training run's forecasts: the ledger as a loop keeps it."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.integrations.looking_back import Realised
from entropy_fast.truth import Calibration, EntropyLedger

__all__ = ["ForecastLedger"]

ROLLING = 50  # steps that slope and coverage look back on


class ForecastLedger:
    """Forecasts by step and part, and what those steps did.

    Args:
        path: of the file; None keeps it in memory.

    Attributes:
        entries: the ledger itself.
        calibration: of the direct part over the last steps; None until something is known of them.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.entries = EntropyLedger(path)
        self.calibration: Calibration | None = None

    def begin(self, step: int) -> None:
        """A training goes on after so many steps: what the ledger holds of later ones is of another branch.

        Then this run gets a ledger of its own beside it.
        """
        if any(row.step >= step for row in self.entries.rows()):
            self.entries = EntropyLedger(None if self.entries.path is None else _beside(self.entries.path, step))
        self._calibrate()

    def forecast(self, step: int, result: DeltaH1Result) -> None:
        """Write down the forecast of a step."""
        parts = {"total": (result.delta_h1, result.std_error)}
        if result.split is not None:
            for name in ("direct", "visitation"):
                own = getattr(result.split, name)
                parts[name] = own.value, own.std_error
        for name, (value, error) in parts.items():
            self.entries.record(
                step, part=name, forecast=value, std_error=error, learning_rate=result.learning_rate, unit=result.unit
            )

    def realised(self, step: int, realised: Realised) -> None:
        """Write down what a step did."""
        known = {(row.step, row.part) for row in self.entries.rows()}
        for part, value, error in (
            ("total", realised.total, realised.total_error),
            ("direct", realised.direct, realised.direct_error),
        ):
            if math.isfinite(value) and (step, part) in known:
                self.entries.realise(step, part, value, error)
        self._calibrate()

    def _calibrate(self) -> None:
        found = self.entries.calibration("direct", window=ROLLING)
        self.calibration = found if found.n else None


def _beside(path: Path, step: int) -> Path:
    """A name for a ledger that goes on from a step, which no file has."""
    for count in itertools.count(1):
        found = path.with_name(f"{path.stem}.from-{step}{'' if count == 1 else f'-{count}'}{path.suffix}")
        if not found.exists():
            return found
    raise AssertionError("counting has an end")
