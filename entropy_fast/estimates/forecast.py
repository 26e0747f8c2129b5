"""A forecast with its error bars: of δH₁, or of a part of it.

Two questions have two answers. What *this* update will do is uncertain because the entropy gradient was estimated from a
sample; what *such* an update does on average is uncertain because the update itself is a sample too.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from scipy.stats import t as student_t
from torch import Tensor

from entropy_fast.errors import ConfigError
from entropy_fast.estimates.attribution import Role, SequenceContributions, by_layer
from entropy_fast.estimates.intervals import LEVEL

__all__ = ["LEVEL", "Forecast", "half_width"]


def half_width(std_error: float, degrees: float, level: float) -> float:
    """Of an interval by Student's t on so many degrees of freedom; NaN when there is no standard error.

    Raises:
        ConfigError: ``level`` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"interval: level is {level}.", fix="use a number between 0 and 1, such as 0.95.")
    if math.isnan(std_error):
        return math.nan
    return float(student_t.ppf((1 + level) / 2, degrees)) * std_error


@dataclasses.dataclass(frozen=True, eq=False)
class Forecast:
    """A change to first order in the learning rate, in the unit of the result that it belongs to.

    Attributes:
        value: the estimate.
        std_error: for the change by this very update; NaN where it is not known.
        population_std_error: for the change by such updates on average, likewise.
        n_units: units (prompts, or blocks) that they come from.
        by_unit: [n_units] share of each, adding up to ``value``: with one batch the mean of its part as one whose numbers
            change and its part as one whose update changes them; with two its part as a prompt of the entropy batch.
        by_parameter: share by parameter name, in model order, adding up to ``value``; None where the engine does not know it.
        by_sequence: shares of sequences by the role of their batch, likewise; None unless they were asked for.
        by_token: [N, T] shares of response tokens as ones whose numbers change, in the columns of the entropy batch as it was
            given, likewise; 0 elsewhere. None unless they were asked for.
        kernel: [n_units, n_units] what every unit's update does to every unit's numbers, before the learning rate: K_nm =
            X_n · Y_m; None where it was not kept, and with two batches.
        degrees: of freedom of the interval for this update, from how long the tails of the units' rows are (Satterthwaite);
            None for units - 1.
        population_degrees: likewise of the one for such updates.
        largest_share: the share of the variance for such updates that is in one unit; NaN where it is not known.
    """

    value: float
    std_error: float
    population_std_error: float
    n_units: int
    by_unit: Tensor
    by_parameter: dict[str, float] | None = None
    by_sequence: dict[Role, SequenceContributions] | None = None
    by_token: Tensor | None = None
    kernel: Tensor | None = None
    degrees: float | None = None
    population_degrees: float | None = None
    largest_share: float = math.nan

    @classmethod
    def unknown(cls, n_units: int) -> Forecast:
        """Of something that was not asked for."""
        return cls(math.nan, math.nan, math.nan, n_units, torch.full((n_units,), torch.nan, dtype=torch.float64))

    @property
    def by_layer(self) -> dict[str, float] | None:
        """``by_parameter`` added up by decoder layer; what is in no layer (embeddings, the final norm) by its module."""
        return None if self.by_parameter is None else by_layer(self.by_parameter)

    def interval(self, level: float = LEVEL, *, such_updates: bool = False) -> tuple[float, float]:
        """Confidence interval by Student's t on Satterthwaite's degrees of freedom; NaN when there is no standard error.

        Args:
            level: coverage aimed at, between 0 and 1; docs/validation.md says what it comes to.
            such_updates: for what such updates do on average, instead of for the change by this very one.

        Raises:
            ConfigError: ``level`` is not between 0 and 1.
        """
        error, degrees = self.std_error, self.degrees
        if such_updates:
            error, degrees = self.population_std_error, self.population_degrees
        half = half_width(error, self.n_units - 1 if degrees is None else degrees, level)
        return self.value - half, self.value + half

    @property
    def established(self) -> bool | None:
        """Whether the sign of the change by this very update is beyond doubt; None when there is no standard error.

        It is where |value| is at least two standard errors and the 95 % interval leaves out 0.
        """
        low, high = self.interval()
        return None if math.isnan(low) else (low > 0 or high < 0) and abs(self.value) >= 2 * self.std_error
