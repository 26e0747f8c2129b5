"""Forecasts stay within their share of the time, whatever they cost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_fast.errors import ConfigError
from entropy_fast.integrations.time_budget import FEWEST_PROMPTS, TimeBudget


@given(
    share=st.floats(0.01, 0.5), fixed=st.floats(0.0, 2.0), each=st.floats(0.001, 1.0),
    step=st.floats(0.1, 5.0), available=st.integers(3, 64),
)  # fmt: skip
def test_the_share_is_kept_but_for_the_first_forecasts(
    share: float, fixed: float, each: float, step: float, available: int
) -> None:
    budget, taken = TimeBudget(share), []
    for _ in range(300):
        budget.train(step)
        prompts = budget.prompts(available)
        if prompts is not None:
            assert min(FEWEST_PROMPTS, available) <= prompts <= available
            budget.spend(fixed + each * prompts, prompts)
            taken.append(prompts)
    # Before costs are known, one forecast of the smallest size; until two sizes are known, cost is taken for proportional,
    # which allows one that is too small a number of prompts for its time, never too long.
    first = fixed + each * min(FEWEST_PROMPTS, available)
    assert budget.spent <= share * budget.trained + first + 1e-9
    assert taken


def test_a_cheap_forecast_takes_everything_and_a_dear_one_waits() -> None:
    budget = TimeBudget(0.1)
    budget.train(100.0)
    budget.spend(0.3, 3)
    assert budget.prompts(64) == 64  # 6.4 s at most of 9.7 s
    dear = TimeBudget(0.1)
    dear.train(10.0)
    dear.spend(3.0, 3)
    assert dear.prompts(64) is None  # 2 s too much already
    dear.train(50.0)
    assert dear.prompts(64) == 3


def test_fixed_costs_are_told_from_costs_by_prompt() -> None:
    budget = TimeBudget(1.0)
    budget.spend(2.0 + 3 * 0.5, 3)
    budget.spend(2.0 + 8 * 0.5, 8)
    budget.train(9.5 + 5.0)
    assert budget.prompts(64) == 6  # (5 - 2) / 0.5


def test_no_limit_and_no_share() -> None:
    assert TimeBudget(None).prompts(7) == 7
    assert math.isnan(TimeBudget(0.1).used)
    for share in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="budget"):
            TimeBudget(share)
