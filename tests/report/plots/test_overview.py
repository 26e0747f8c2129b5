"""A page has what its result holds."""

from __future__ import annotations

import dataclasses

import pytest
from artists import bars
from shown_results import bare, full, two_batches

from entropy_fast.report.plots.overview import contributions

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_what_is_held_is_on_the_page():
    parts, step, updates = (f"{x}" for x in ("Change of the entropy", "What each part of", "Updates compared"))
    prompts, layers = "Which prompts change", "Which layers change"
    for result, expected in (
        (full(), [parts, step, updates, prompts, layers]),
        (bare(), [parts, prompts, layers]),
        (two_batches(), [parts, prompts]),
    ):
        found = titles(result.plot())
        assert len(found) == len(expected)
        assert all(title.startswith(start) for title, start in zip(found, expected, strict=True))


def test_update_prompts_have_a_panel_where_they_have_shares():
    result = two_batches()
    update = [dataclasses.replace(unit, role="update") for unit in result.per_prompt]
    figure = contributions(dataclasses.replace(result, per_prompt=(*result.per_prompt, *update)))
    assert titles(figure)[1:] == ["Which prompts change the entropy", "Which prompts' updates change the entropy"]
    assert all(len(bars(ax)) == len(update) for ax in figure.axes[1:])
