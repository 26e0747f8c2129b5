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
            budget.spend(fixed + each * prompts)
            budget.forecasts.see(prompts, fixed + each * prompts)
            taken.append(prompts)
    # Before costs are known, one forecast of the smallest size; until two sizes are known, cost is taken for proportional,
    # which allows one that is too small a number of prompts for its time, never too long.
    first = fixed + each * min(FEWEST_PROMPTS, available)
    assert budget.spent <= share * budget.trained + first + 1e-9
    assert taken


def spend(budget: TimeBudget, seconds: float, prompts: int) -> None:
    budget.spend(seconds)
    budget.forecasts.see(prompts, seconds)


@given(
    share=st.floats(0.01, 0.5), costs=st.tuples(*[st.floats(0.0, 2.0), st.floats(0.001, 1.0)] * 2),
    step=st.floats(0.1, 5.0), available=st.integers(3, 64),
)  # fmt: skip
def test_what_is_promised_is_in_the_share_too(
    share: float, costs: tuple[float, float, float, float], step: float, available: int
) -> None:
    """A forecast, and at the next step the look at what it was of: never more than the share, once both costs are known."""
    budget, promised, looked, least = TimeBudget(share, verified=True), None, 0, min(FEWEST_PROMPTS, available)
    first = costs[0] + costs[2] + (costs[1] + costs[3]) * least
    for _ in range(300):
        budget.train(step)
        if promised is not None:
            seconds = costs[2] + costs[3] * promised
            budget.spend(seconds)
            budget.verifications.see(promised, seconds)
            promised, looked = None, looked + 1
            assert budget.spent <= share * budget.trained + first + 1e-9
        prompts = budget.prompts(available)
        if prompts is not None:
            spend(budget, costs[0] + costs[1] * prompts, prompts)
            promised = prompts
    assert looked or first > share * budget.trained


def test_a_look_that_was_never_taken_is_expected_to_cost_a_forecast() -> None:
    for verified, prompts in ((False, 60), (True, 30)):
        budget = TimeBudget(0.1, verified=verified)
        spend(budget, 0.3, 3)
        budget.train(63.0)
        assert budget.prompts(64) == prompts


def test_a_cheap_forecast_takes_everything_and_a_dear_one_waits() -> None:
    budget = TimeBudget(0.1)
    budget.train(100.0)
    spend(budget, 0.3, 3)
    assert budget.prompts(64) == 64  # 6.4 s at most of 9.7 s
    dear = TimeBudget(0.1)
    dear.train(10.0)
    spend(dear, 3.0, 3)
    assert dear.prompts(64) is None  # 2 s too much already
    dear.train(50.0)
    assert dear.prompts(64) == 3


def test_fixed_costs_are_told_from_costs_by_prompt() -> None:
    budget = TimeBudget(1.0)
    spend(budget, 2.0 + 3 * 0.5, 3)
    spend(budget, 2.0 + 8 * 0.5, 8)
    budget.train(9.5 + 5.0)
    assert budget.prompts(64) == 6  # (5 - 2) / 0.5


def test_no_limit_and_no_share() -> None:
    assert TimeBudget(None).prompts(7) == 7
    assert math.isnan(TimeBudget(0.1).used)
    for share in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="budget"):
            TimeBudget(share)
