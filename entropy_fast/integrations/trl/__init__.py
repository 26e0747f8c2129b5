"""Forecasts inside TRL's GRPO trainer."""

from entropy_fast.integrations.forecast import StepForecast
from entropy_fast.integrations.trl.callback import EntropyForecastCallback, EntropyForecastMixin

__all__ = ["EntropyForecastCallback", "EntropyForecastMixin", "StepForecast"]
