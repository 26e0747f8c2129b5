"""Points are forecasts, lines their 95 % intervals, and what is not known is not there."""

from __future__ import annotations

import dataclasses

import pytest
from artists import filled, lines, right_numbers, rows, texts
from shown_results import bare, full, two_batches, unknown_errors

from entropy_fast.errors import ConfigError, ResultError

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def assert_drawn(ax, forecasts):
    points, intervals = lines(ax, "_forecast"), lines(ax, "_interval")
    assert [x for x, _ in points] == [[forecast.value] for forecast in forecasts]
    assert [x for x, _ in intervals] == [list(forecast.interval()) for forecast in forecasts]
    assert [y[0] for _, y in points] == [y[0] for _, y in intervals] == sorted(y[0] for _, y in points)
    assert filled(ax, "_forecast") == [bool(forecast.established) for forecast in forecasts]


def test_parts_with_their_intervals():
    result = full()
    ax = result.plot.parts()
    split = result.split
    assert rows(ax) == ["direct", "visitation", "total"]
    assert_drawn(ax, [split.direct, split.visitation, split.total])
    assert result.unit in ax.get_xlabel()
    percent = 100 * result.forecast.value / result.entropy_level
    assert f"total: {percent:+.2g} % of".replace("-", "−") in texts(ax.figure)
    certain = dataclasses.replace(split.direct, std_error=abs(split.direct.value) / 50)
    ax = dataclasses.replace(result, split=dataclasses.replace(split, direct=certain)).plot.parts()
    assert filled(ax, "_forecast")[0]


def test_parts_that_are_not_known_are_not_drawn():
    assert rows(bare().plot.parts()) == ["total"]
    ax = two_batches().plot.parts()
    assert rows(ax) == ["direct"]
    assert_drawn(ax, [two_batches().forecast])


def test_without_a_standard_error_there_is_no_line_and_it_is_said():
    ax = unknown_errors(full()).plot.parts()
    assert lines(ax, "_interval") == []
    assert len(lines(ax, "_forecast")) == 3 and not any(filled(ax, "_forecast"))
    assert all("no interval" in number for number in right_numbers(ax))
    assert "too few prompts" in texts(ax.figure)


def test_parts_of_the_step_and_the_whole_of_it():
    result = full()
    ax = result.plot.step_parts()
    assert rows(ax)[-1] == "whole step" and len(rows(ax)) == len(result.step_parts) + 1
    drawn = [own for part in result.step_parts.values() for own in (part.split.direct, part.forecast)]
    assert_drawn(ax, [*drawn, result.split.direct, result.forecast])
    assert "momentum" in rows(ax)


def test_updates_by_entropy_and_by_another_number():
    result = full()
    ax = result.plot.updates()
    bonus = result.updates["bonus"]
    assert rows(ax) == ["planned", "bonus"]
    assert_drawn(ax, [result.split.direct, result.forecast, bonus.split.direct, bonus.forecast])
    ax = result.plot.updates("length")
    assert_drawn(ax, [result.functionals["length"], bonus.functionals["length"]])
    assert "length" in ax.get_xlabel() and result.unit not in ax.get_xlabel()
    with pytest.raises(ConfigError, match="use one of 'entropy', 'length', 'odd'"):
        result.plot.updates("reward")


def test_numbers_at_the_right_are_in_the_axis_s_power_of_ten():
    result = full()
    small = dataclasses.replace(result.split.direct, value=-4.2e-7, std_error=1e-8)
    ax = dataclasses.replace(
        result, split=dataclasses.replace(result.split, direct=small, visitation=small, total=small)
    )
    ax = dataclasses.replace(ax, forecast=small).plot.parts()
    assert "10⁻⁷ nats" in ax.get_xlabel()
    assert all(number.startswith("−4.20  [−4.") for number in right_numbers(ax))
    assert lines(ax, "_forecast")[0][0] == [-4.2e-7]


def test_what_a_result_lacks_is_an_error():
    with pytest.raises(ResultError, match="step='next'"):
        bare().plot.step_parts()
    with pytest.raises(ResultError, match="updates="):
        bare().plot.updates()
