"""Verdict, parts, log-probs and method: what the page says is what the result holds."""

from __future__ import annotations

import dataclasses
import math

import pytest
from saved_results import made_result, made_run

from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.estimates.split import Split
from entropy_fast.report.html.numbers import interval_text, percent, with_error
from entropy_fast.report.html.sections.logprobs import logprobs_section
from entropy_fast.report.html.sections.method import method_section
from entropy_fast.report.html.sections.parts import candidate_section, functional_rows, parts_section, step_section
from entropy_fast.report.html.sections.verdict import verdict_section
from entropy_fast.rollouts import EmptyResponseReport


def direct_alone():
    result = made_result()
    unknown = dataclasses.replace(result.forecast, value=math.nan, std_error=math.nan)
    split = dataclasses.replace(result.split, total=unknown, visitation=unknown)
    options = EstimateOptions(parts=("direct",), step="next")
    return dataclasses.replace(
        result, delta_h1=math.nan, std_error=math.nan, split=split, forecast=split.direct, estimate_options=options
    )


def test_the_verdict_and_its_numbers():
    result = made_result()
    found = verdict_section(result)
    assert found.sentence.replace("\u00a0", " ") == result.verdict.sentence
    assert found.explanation.replace("\u00a0", " ") == result.explain()
    assert [figure.value for figure in found.figures] == [
        "1.40", percent(result.split.direct.value, 1.4), percent(result.delta_h1, 1.4)
    ]  # fmt: skip
    assert found.warnings == ("a note",)
    assert len(verdict_section(direct_alone()).figures) == 2
    assert [f.label for f in verdict_section(made_result(split=None)).figures] == ["Entropy now", "In all"]


def test_model_optimizer_and_learning_rate_stand_in_front():
    result = made_result()
    saved = made_run(result, optimizer="AdamW\x1b[2J").result
    facts = ("small (float32, cpu)", "AdamW[2J", "learning rate 0.0001", "length weights dr_grpo (Dr. GRPO)")
    assert verdict_section(saved.result, saved.provenance).facts == facts
    assert verdict_section(result).facts == facts[2:]
    assert verdict_section(result, made_run(result).result.provenance).facts == (facts[0], *facts[2:])
    live = made_result(estimate_options=EstimateOptions(gradient="live", step="next"))
    assert verdict_section(live).facts == facts[2:3]  # the loss that left the gradient is not known


def test_what_is_not_established_has_no_colour_of_a_sign():
    result = made_result()
    sure, unsure, unknown = (
        dataclasses.replace(result.split.direct, value=-1.0, std_error=error) for error in (0.1, 1.0, math.nan)
    )
    split = Split(result.split.total, unsure, sure, 0.0)
    found = dataclasses.replace(result, split=split, forecast=unknown)
    assert [row.side for row in parts_section(found).figure.rows[:2]] == ["unsure", "lowers"]
    assert [figure.side for figure in verdict_section(found).figures] == ["", "unsure", "unsure"]


def test_parts_have_their_intervals():
    result = made_result()
    found = parts_section(result)
    for row, name in zip(found.figure.rows, ("direct", "visitation", "total"), strict=True):
        forecast = getattr(result.split, name)
        assert row.label == name.capitalize()
        assert row.value == with_error(forecast.value, forecast.std_error)
        assert row.interval == interval_text(*forecast.interval())
        axis = found.figure.axis
        assert (row.low, row.place, row.high) == tuple(
            axis.place(x) for x in (forecast.interval()[0], forecast.value, forecast.interval()[1])
        )
        assert row.sure is forecast.established
    assert [name for name, _ in found.such_updates] == ["Direct", "Visitation", "Total"]
    assert [row.label for row in parts_section(direct_alone()).figure.rows] == ["Direct"]
    assert [row.label for row in parts_section(made_result(split=None)).figure.rows] == ["Change"]


def test_too_few_prompts_have_a_dot_without_an_interval():
    result = made_result()
    unknown = dataclasses.replace(result.split.direct, std_error=math.nan)
    found = parts_section(dataclasses.replace(result, split=dataclasses.replace(result.split, direct=unknown)))
    row = found.figure.rows[0]
    assert (row.low, row.high, row.sure, row.interval) == (None, None, None, "")
    assert row.place is not None


def test_step_candidates_and_functionals():
    result = made_result()
    assert [(title, [row.label for row in figure.rows]) for title, figure in step_section(result)] == [
        ("At the prefixes visited today", ["Momentum", "Fresh"]),
        ("In all", ["Momentum", "Fresh"]),
    ]
    found = candidate_section(result)
    assert [[row.label for row in figure.rows] for _, figure in found.figures] == [["planned", "with a bonus"]] * 2
    assert found.functionals == ("reward",) and [row.label for row in found.rows] == ["planned", "with a bonus"]
    [(name, value, _, such)] = functional_rows(result)
    forecast = result.functionals["reward"]
    assert (name, value) == ("reward", with_error(forecast.value, forecast.std_error))
    assert such == with_error(forecast.value, forecast.population_std_error)
    # Where the direct part alone was asked for, nothing is said of the whole.
    assert [title for title, _ in step_section(direct_alone())] == ["At the prefixes visited today"]
    assert [title for title, _ in candidate_section(direct_alone()).figures] == ["At the prefixes visited today"]
    assert candidate_section(made_result(updates={})) is None
    assert step_section(made_result(step_parts={})) == ()


def test_sequences_whose_logprobs_are_off_by_row():
    result = made_result(4)
    ratios = result.sequences["update"].ratios
    found = logprobs_section(result)
    far = [row for row, mean in enumerate(ratios.mean_log_ratio.tolist()) if mean > 0.05]
    assert sorted(row.row for row in found.rows) == far and far
    assert found.of == 12
    # Rows that were left out of the estimate are counted in the rollouts' own numbers.
    empty = {"rollouts": EmptyResponseReport((0, 5), ())}
    moved = dataclasses.replace(result, diagnostics=dataclasses.replace(result.diagnostics, empty_responses=empty))
    places = [row for row in range(14) if row not in (0, 5)]
    assert [row.row for row in logprobs_section(moved).rows] == [places[row.row] for row in found.rows]
    bare = {name: dataclasses.replace(table, ratios=None) for name, table in result.sequences.items()}
    without = dataclasses.replace(result, sequences=bare)
    assert logprobs_section(without) is None
    assert "Since sampling" in dict(method_section(made_run(without).result).facts)
    assert "Since sampling" not in dict(method_section(made_run(result).result).facts)


def test_how_it_was_computed():
    result = made_result(
        estimate_options=EstimateOptions(step="next", weighting="pooled"), run_options=RunOptions(by_token=True)
    )
    found = method_section(made_run(result).result)
    facts = dict(found.facts)
    assert facts["Model"] == "small (float32, cpu)"
    assert facts["From"] == "one batch, 4 prompts with 12 responses"
    assert facts["Plan"] == str(result.plan)
    assert dict(found.options) == {"weighting": "pooled", "step": "next", "by_token": "True"}
    assert found.commands == ("entropy-fast probe runs/made",)
    assert dict(found.versions) == {"torch": "2"}
    unknown = method_section(dataclasses.replace(made_run(result).result, provenance=None))
    assert (unknown.commands, unknown.files, unknown.made) == ((), (), "not recorded")


@pytest.mark.parametrize("value", [0.0, 3e-9, -2.0])
def test_what_is_exactly_known_has_no_interval(value):
    result = made_result()
    certain = dataclasses.replace(result.split.direct, value=value, std_error=0.0)
    found = parts_section(dataclasses.replace(result, split=dataclasses.replace(result.split, direct=certain)))
    assert found.figure.rows[0].interval == ""
