"""How many prompts a forecast may take, so that forecasts stay within a share of the training time.

Legend: β the share, T seconds of training so far without forecasts, F seconds of forecasts so far, c(k) ≈ a + b k seconds of a
forecast from k prompts, v(k) likewise those of finding out afterwards what the step did.

A forecast may take up to A = β T - F, what the share allows by now. One that is to be held against what the step does promises
to look, and is made only where both fit: c(k) + v(k) ≤ A. From the seconds that earlier ones took, c and v are fitted by
least squares each (one size alone gives costs proportional to k); a look that has never been taken is expected to cost as
much as a forecast. The largest k that fits is taken. Where not even the smallest does, the step goes without a forecast and A
grows until one does.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from entropy_fast.errors import ConfigError

__all__ = ["FEWEST_PROMPTS", "Costs", "TimeBudget"]

FEWEST_PROMPTS = 3  # of which a standard error can be made
REMEMBERED = 32  # forecasts that the fit looks back on


class Costs:
    """Seconds that something took, by the number of prompts it was made from."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    @property
    def known(self) -> bool:
        """Whether anything has been seen."""
        return bool(self._seen)

    def see(self, prompts: int, seconds: float) -> None:
        """Note one more."""
        self._seen.append((prompts, seconds))

    def fit(self) -> tuple[float, float]:
        """Seconds whatever the number of prompts, and seconds of each; neither below 0."""
        sizes, seconds = zip(*self._seen, strict=True)
        mean_size, mean_seconds = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
        spread = sum((k - mean_size) ** 2 for k in sizes)
        if spread:
            each = sum((k - mean_size) * (s - mean_seconds) for k, s in zip(sizes, seconds, strict=True)) / spread
            fixed = mean_seconds - each * mean_size
            if each >= 0 and fixed >= 0:
                return fixed, each
        return 0.0, mean_seconds / mean_size


@dataclasses.dataclass
class TimeBudget:
    """Seconds spent, and what they allow.

    Attributes:
        share: β, of the training time; None for no limit.
        verified: whether forecasts are held against what the step does.
        trained: T.
        spent: F.
        attempted: whether a forecast was tried, perhaps in vain.
        forecasts: c, as far as it was seen.
        verifications: v, likewise.

    Raises:
        ConfigError: the share is not above 0.
    """

    share: float | None
    verified: bool = False
    trained: float = 0.0
    spent: float = 0.0
    attempted: bool = False
    forecasts: Costs = dataclasses.field(default_factory=Costs, repr=False)
    verifications: Costs = dataclasses.field(default_factory=Costs, repr=False)

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

    def spend(self, seconds: float) -> None:
        """Note time that something for forecasts took, whatever it was."""
        self.spent += seconds

    def forget_clock(self) -> None:
        """Begin a new training: what was spent is of another; what forecasts cost is still known."""
        self.trained = self.spent = 0.0
        self.attempted = False

    @property
    def affordable(self) -> bool:
        """Whether the smallest forecast may be made now."""
        if self.share is None:
            return True
        allowed = self.share * self.trained - self.spent
        if not self.forecasts.known:
            # Nothing is known of the cost yet, and finding out is allowed once; what failed has cost as well.
            return not self.attempted or allowed > 0
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
        if not self.forecasts.known:
            # The smallest forecast finds out what it costs, and what it takes too long comes off the next.
            return least if self.affordable else None
        allowed = self.share * self.trained - self.spent
        fixed, each = self._cost()
        if fixed + each * least > allowed:
            return None
        return available if each <= 0 else max(least, min(available, int((allowed - fixed) / each)))

    def _cost(self) -> tuple[float, float]:
        """Of a forecast and, where it is promised, of the look afterwards."""
        fixed, each = self.forecasts.fit()
        if not self.verified:
            return fixed, each
        more = self.verifications.fit() if self.verifications.known else (fixed, each)
        return fixed + more[0], each + more[1]
