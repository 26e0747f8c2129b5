"""How many prompts a forecast may take, so that forecasts stay within a share of the training time.

Legend: β the share, T seconds of training so far without forecasts, F seconds of forecasts so far, c(k) ≈ a + b k seconds of a
forecast from k prompts.

A forecast may take up to A = β T - F, what the share allows by now. From the seconds that earlier forecasts took, c is fitted
by least squares (one size alone gives c proportional to k), and the largest k with c(k) ≤ A is taken. Where not even the
smallest fits, the step goes without a forecast and A grows until one does.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from entropy_fast.errors import ConfigError

__all__ = ["FEWEST_PROMPTS", "TimeBudget"]

FEWEST_PROMPTS = 3  # of which a standard error can be made
REMEMBERED = 32  # forecasts that the fit looks back on


@dataclasses.dataclass
class TimeBudget:
    """Seconds spent, and what they allow.

    Attributes:
        share: β, of the training time; None for no limit.
        trained: T.
        spent: F.

    Raises:
        ConfigError: the share is not above 0.
    """

    share: float | None
    trained: float = 0.0
    spent: float = 0.0
    _seen: deque[tuple[int, float]] = dataclasses.field(default_factory=lambda: deque(maxlen=REMEMBERED), repr=False)

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < math.inf:
            raise ConfigError(
                f"budget is {self.share!r}.", fix="give a share of the training time above 0, such as 0.1, or None."
            )

    @property
    def used(self) -> float:
        """F / T, NaN before any training."""
        return self.spent / self.trained if self.trained else math.nan

    def train(self, seconds: float) -> None:
        """Note training time."""
        self.trained += seconds

    def spend(self, seconds: float, prompts: int | None = None) -> None:
        """Note the time of a forecast from so many prompts; None for what else was done for forecasts."""
        self.spent += seconds
        if prompts is not None:
            self._seen.append((prompts, seconds))

    def forget_clock(self) -> None:
        """Begin a new training: what was spent is of another; what forecasts cost is still known."""
        self.trained = self.spent = 0.0

    @property
    def affordable(self) -> bool:
        """Whether the smallest forecast may be made now."""
        if self.share is None:
            return True
        allowed = self.share * self.trained - self.spent
        if not self._seen:
            # Nothing is known of the cost yet, and finding out is allowed once; what failed has cost as well.
            return self.spent == 0 or allowed > 0
        fixed, each = self._cost()
        return fixed + each * FEWEST_PROMPTS <= allowed

    def prompts(self, available: int, least: int = FEWEST_PROMPTS) -> int | None:
        """How many of the available prompts may be taken now; None where the step has to go without.

        Args:
            available: prompts of the batch.
            least: fewer than these are not worth it.
        """
        least = min(least, available)
        if self.share is None:
            return available
        allowed = self.share * self.trained - self.spent
        if not self._seen:
            # The smallest forecast finds out what it costs, and what it takes too long comes off the next.
            return least if self.affordable else None
        fixed, each = self._cost()
        if fixed + each * least > allowed:
            return None
        return available if each <= 0 else max(least, min(available, int((allowed - fixed) / each)))

    def _cost(self) -> tuple[float, float]:
        """A and b of the fit, neither below 0."""
        sizes, seconds = zip(*self._seen, strict=True)
        mean_size, mean_seconds = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
        spread = sum((k - mean_size) ** 2 for k in sizes)
        if spread:
            each = sum((k - mean_size) * (s - mean_seconds) for k, s in zip(sizes, seconds, strict=True)) / spread
            fixed = mean_seconds - each * mean_size
            if each >= 0 and fixed >= 0:
                return fixed, each
        return 0.0, mean_seconds / mean_size
