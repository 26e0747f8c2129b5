"""Two trainings with TRL's trainer, one of them with forecasts: they must be the same bit by bit."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from entropy_fast.errors import EntropyFastWarning
from entropy_fast.integrations.forecast import StepForecast
from entropy_fast.integrations.trl import EntropyForecastCallback

EXACT = 1 - 1e-6
CLOCKED = ("time", "runtime", "per_second")


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), [repr(part) for part in np.random.get_state()]]


def forecasting(trainer: Any, **callback: Any) -> list[StepForecast]:
    """Register the callback, by default without a limit to its time; the list fills with the training's forecasts."""
    seen: list[StepForecast] = []
    trainer.add_callback(EntropyForecastCallback(trainer, **{"budget": None, "on_forecast": [seen.append], **callback}))
    return seen


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """[bytes]; a NaN has some too."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_training(plain: Any, probed: Any) -> None:
    """Assert that two trainers that have trained hold and have logged the same."""
    for (name, a), (_, b) in zip(plain.model.named_parameters(), probed.model.named_parameters(), strict=True):
        assert torch.equal(bits(a), bits(b)), name
    assert len(plain.state.log_history) == len(probed.state.log_history)
    for before, after in zip(plain.state.log_history, probed.state.log_history, strict=True):
        for key, value in before.items():
            if not key.endswith(CLOCKED):
                assert after[key] == value or (math.isnan(value) and math.isnan(after[key])), key


def trained_with_and_without(
    make: Callable[[], Any], **callback: Any
) -> tuple[Any, list[StepForecast], list[warnings.WarningMessage]]:
    """Train two trainers made alike; the one with forecasts, what it forecast, and our warnings."""
    plain = make()
    plain.train()
    states = random_states()
    probed = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = forecasting(probed, **callback)
        probed.train()
    assert random_states() == states
    same_training(plain, probed)
    return probed, seen, [w for w in caught if issubclass(w.category, EntropyFastWarning)]


def own_gradient(seen: Sequence[StepForecast], *, cosine: float = EXACT, scale: float = 1e-4) -> None:
    """Assert that every step was forecast, in finite numbers, and that the captured coefficients make up its gradient."""
    compared = 0
    for forecast in seen:
        assert forecast.result is not None, forecast.reason
        live = forecast.result.diagnostics.live_gradient
        assert live is not None and live.prompts == live.of
        numbers = forecast.metrics()
        for part in ("total", "direct", "visitation"):
            assert math.isfinite(numbers[part])
            assert math.isfinite(numbers[f"{part}_error"]) or live.of < 3  # two prompts say nothing of their own spread
        if not math.isnan(live.cosine):  # no response of the step had an advantage
            compared += 1
            assert live.cosine > cosine
            assert abs(live.scale - 1) < scale
    assert compared


def refused(seen: Sequence[StepForecast], caught: Sequence[warnings.WarningMessage], reason: str) -> None:
    """Assert that no step was forecast, for that reason, and that one warning says it."""
    assert seen and all(f.failed and f.result is None and reason in str(f.reason) for f in seen)
    assert all(math.isnan(f.metrics()[name]) for f in seen for name in ("total", "direct", "visitation"))
    assert len(caught) == 1 and reason in str(caught[0].message)
