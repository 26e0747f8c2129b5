"""A warning comes before the fall, and not without one."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from entropy_fast.errors import ConfigError
from entropy_fast.integrations.early_warning import EntropyFloor, lowering_most


def forecast(step: int, level: float, change: float, error: float, tokens: Any = None) -> Any:
    part = SimpleNamespace(value=change, std_error=error)
    prompts = [
        SimpleNamespace(delta_h1=-0.3, prompt="two\x1b[31m", group_ids=(4,), role="both"),
        SimpleNamespace(delta_h1=-0.5, prompt=None, group_ids=(7,), role="both"),
        SimpleNamespace(delta_h1=0.2, prompt="up", group_ids=(9,), role="both"),
    ]
    result = SimpleNamespace(
        split=SimpleNamespace(direct=part),
        forecast=part,
        entropy_level=level,
        unit="nats per token",
        per_prompt=prompts,
    )
    return SimpleNamespace(step=step, result=result, tokens=tokens)


def test_warns_before_half_of_the_entropy_is_gone() -> None:
    floor, level, rng = EntropyFloor(1.0, within=50), 2.0, np.random.default_rng(0)
    for step in range(100):
        floor(forecast(step, level, -0.03 + 0.003 * rng.normal(), 0.003))
        level -= 0.03
        if floor.warnings:
            break
    assert level > 1.5
    found = floor.warnings[0]
    assert found.prompts[0] == ("group 7", -0.5) and found.prompts[1] == (repr("two\x1b[31m"), -0.3)
    assert "\x1b" not in str(found) and "falls below 1 within 50 steps" in str(found)


def test_tokens_are_asked_for_only_where_a_warning_is_given(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def named(count: int) -> tuple[tuple[str, float], ...]:
        asked.append(count)
        return ((repr("7\x1b[31m"), -0.02), ("token 4", -0.01))

    def broken(_: int) -> None:
        raise RuntimeError("no forward derivative")

    floor = EntropyFloor(1.0, within=50, on_warning=lambda _: None)
    for step in range(6):
        floor(forecast(step, 1.5, -0.03, 0.001, SimpleNamespace(lowering_most=named)))
    assert asked == [3] and len(floor.warnings) == 1
    found = floor.warnings[0]
    assert found.tokens[1] == ("token 4", -0.01)
    assert "Tokens where it is lowered most: '7\\x1b[31m' (-0.02), token 4 (-0.01)." in str(found)
    without = EntropyFloor(1.0, within=50, on_warning=lambda _: None)
    for step in range(3):
        without(forecast(step, 1.5, -0.03, 0.001, SimpleNamespace(lowering_most=broken)))
    assert without.warnings[0].tokens == () and "Tokens" not in str(without.warnings[0])
    assert "no forward derivative" in caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_is_silent_where_entropy_does_not_fall(seed: int) -> None:
    floor, rng = EntropyFloor(1.0, within=50), np.random.default_rng(seed)
    for step in range(200):
        floor(forecast(step, 2.0, 0.005 * rng.normal(), 0.005))
    assert not floor.warnings


def test_noise_alone_is_no_warning_and_repeats_are_spaced() -> None:
    noisy = EntropyFloor(1.0, within=50)
    for step in range(20):
        noisy(forecast(step, 2.0, -0.03, 0.2))  # the same number every time, but known badly
    assert not noisy.warnings
    sure = EntropyFloor(1.0, within=50, again_after=10)
    for step in range(25):
        sure(forecast(step, 1.5, -0.03, 0.001))
    assert [w.step for w in sure.warnings] == [2, 12, 22]


def test_where_a_warning_goes(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []
    own, logged = EntropyFloor(1.0, on_warning=seen.append), EntropyFloor(1.0)
    with caplog.at_level(logging.WARNING, logger="entropy_fast"):
        for step in range(3):
            for floor in (own, logged):
                floor(forecast(step, 1.1, -0.05, 0.001))
                floor(SimpleNamespace(step=step, result=None))  # a step without a forecast
    assert len(seen) == 1 and "before step 2" in caplog.text
    assert lowering_most(forecast(0, 1.0, 0.0, 0.0).result, 1) == (("group 7", -0.5),)
    for options in ({"floor": -1.0}, {"floor": 1.0, "within": 0}, {"floor": 1.0, "last": 2}):
        with pytest.raises(ConfigError, match="EntropyFloor"):
            EntropyFloor(**options)
