"""What to do with a result follows from its numbers, and from what of them is established."""

from __future__ import annotations

import dataclasses
import math

import pytest
from saved_results import made_result

from entropy_fast.config import EstimateOptions
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.split import Split, UpdateForecasts
from entropy_fast.report.html.sections.advice import advice

HALVED = "Four times as many prompts, 16 in place of 4, would halve the errors."


def forecast(value: float, error: float = 1e-6) -> Forecast:
    return dataclasses.replace(made_result().forecast, value=value, std_error=error, degrees=None)


def whole(direct: float, visitation: float, error: float = 1e-6) -> UpdateForecasts:
    total = forecast(direct + visitation, error)
    return UpdateForecasts(total, Split(total, forecast(direct, error), forecast(visitation, error), direct), {})


PLANNED = whole(-0.01, -0.05)


def result(planned: UpdateForecasts = PLANNED, **changes):
    return made_result(
        forecast=planned.forecast,
        delta_h1=planned.forecast.value,
        std_error=planned.forecast.std_error,
        split=planned.split,
        **{"step_parts": {}, "updates": {}, "compared": {}, **changes},
    )


def prompts(*as_update: float | None):
    first = made_result().per_prompt[0]
    shares = range(len(as_update), 0, -1)  # so that ranks are places
    return tuple(
        dataclasses.replace(first, group_ids=(n,), delta_h1=-float(share), as_update=own)
        for n, (share, own) in enumerate(zip(shares, as_update, strict=True))
    )


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("momentum", "Momentum, which is older batches, is 67\u00a0% of the total: a smaller learning rate or "),
        ("decay", "Weight decay is 67\u00a0% of the total, whatever the batch"),
        ("fresh", "This batch's gradient is 67\u00a0% of the total, "),
    ],
)
def test_what_carries_the_change_is_what_acts_on_it(part, said):
    parts = {name: whole(0.0, 0.0) for name in ("momentum", "decay", "fresh", "scale")}
    parts |= {part: whole(-0.03, -0.01), "scale": whole(-0.01, -0.01)}
    assert advice(result(step_parts=parts))[0].startswith(said)
    both = dict.fromkeys(("momentum", "decay", "fresh"), whole(-0.03, -0.01)) | {part: whole(-0.1, -0.01)}
    assert advice(result(step_parts=both))[0].startswith(said.partition(" is 67")[0])  # the largest of several
    assert advice(result(whole(0.0, 0.0), step_parts=both)) == (HALVED,)
    for nothing in (whole(-0.03, -0.01, error=0.03), whole(-0.03, 0.0), whole(0.03, 0.01)):
        # Not established, half of it, and against it.
        assert advice(result(step_parts={part: nothing}))[0] == HALVED


def test_where_the_direct_part_alone_is_known_it_is_about_that():
    unknown = Forecast.unknown(4)
    direct = forecast(-0.01)
    alone = dataclasses.replace(
        result(),
        forecast=direct,
        delta_h1=math.nan,
        split=Split(unknown, direct, unknown, -0.01),
        estimate_options=EstimateOptions(parts=("direct",), step="next"),
        step_parts={"momentum": UpdateForecasts(forecast(-0.008), None, {})},
    )
    assert advice(alone)[0].startswith("Momentum, which is older batches, is 80\u00a0% of the direct part:")
    assert len(advice(alone)) == 2


@pytest.mark.parametrize(
    ("as_update", "said"),
    [
        ((0.1, -0.1, 0.0, 0.0, 5.0, 0.1), "few prompts: look at #5 first"),
        ((1.0, -1.0, 1.0, 1.0, 1.0), "many prompts: it is the loss itself"),
        ((None, None, None), "compare some"),
        ((math.nan, 1.0, 1.0), "compare some"),
    ],
)
def test_prompts_whose_updates_do_most_of_it_are_named(as_update, said):
    changed = result(step_parts={"fresh": PLANNED}, per_prompt=prompts(*as_update))
    assert said in advice(changed)[0]


def test_the_update_that_changes_the_entropy_least_is_named_where_that_is_established():
    updates = {
        "a\x1b[2J": whole(-0.009, -0.03),
        "b": whole(-0.001, -0.04),
        "c": whole(-0.02, -0.2),
        "d": whole(0.0, 0.0),
    }
    sure, unsure = whole(0.001, 0.01), whole(0.001, 0.01, error=0.02)
    compared = {"a\x1b[2J": sure, "b": sure, "c": whole(-0.01, -0.15), "d": unsure}
    found = advice(result(updates=updates, compared=compared))[0]
    assert found.startswith(
        "Of the updates compared “a[2J” changes the entropy least in all: by −0.0390 in place of −0.0600,"
    )
    # Where nothing can be said of the total, the direct part decides.
    total = {name: UpdateForecasts(unsure.forecast, sure.split, {}) for name in updates}
    found = advice(result(updates=updates, compared=total))[0]
    assert "“d” changes the entropy least at the prefixes visited today: by 0 in place of −0.0100" in found
    found = advice(result(updates=updates, compared=dict.fromkeys(updates, unsure)))[0]
    assert found.startswith("No update compared changes the entropy less than the planned one")
    assert advice(result(updates=updates))[0] == HALVED  # differences whose errors are not known


def test_how_many_prompts_would_halve_the_errors():
    assert HALVED in advice(result())
    blocks = result(estimate_options=EstimateOptions(step="next", blocks=4))
    unknown = result(whole(-0.01, -0.05, error=math.nan))
    assert not any("halve" in sentence for found in (blocks, unknown) for sentence in advice(found))


def test_visitation_is_named_where_it_is_most():
    assert any("visitation" in sentence for sentence in advice(result()))
    for other in (whole(-0.05, -0.01), whole(-0.01, -0.05, error=0.05)):
        assert not any("visitation" in sentence for sentence in advice(result(other)))


def test_three_sentences_are_enough():
    everything = result(
        step_parts={"momentum": PLANNED}, updates={"a": whole(0.0, 0.0)}, compared={"a": whole(0.01, 0.05)}
    )
    assert len(advice(everything)) == 3
    assert not any("visitation" in sentence for sentence in advice(everything))
