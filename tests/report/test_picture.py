"""The picture shows the interval of the table, and how many of the prompts it shows."""

from __future__ import annotations

import dataclasses

import pytest
from small_policy import saved_run

from entropy_fast import fast_delta_h1, read_rollouts
from entropy_fast.report import picture
from entropy_fast.report.picture import write_picture
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = saved_run(tmp_path_factory.mktemp("run"))
    model = attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")
    return fast_delta_h1(model, folder / "optimizer.pt", read_rollouts(folder / "rollouts.jsonl"))


def ends_of_error_bar(figure):
    [bar] = [c for c in figure.axes[0].containers if type(c).__name__ == "ErrorbarContainer"]
    [[left, right]] = bar.lines[2][0].get_segments()
    return left[0], right[0]


def test_the_error_bar_is_the_interval_of_the_table(result):
    assert ends_of_error_bar(picture._figure(result)) == pytest.approx(result.interval(0.95), rel=1e-9)
    assert result.interval(0.95)[1] - result.delta_h1 > 2.5 * result.std_error  # Student's t of few prompts


def test_without_a_standard_error_there_is_no_bar_and_it_is_said(result):
    unknown = float("nan")
    forecast = dataclasses.replace(result.forecast, std_error=unknown)
    figure = picture._figure(dataclasses.replace(result, std_error=unknown, forecast=forecast))
    assert not [c for c in figure.axes[0].containers if type(c).__name__ == "ErrorbarContainer"]
    assert "no standard error" in figure.axes[0].get_xlabel()


def test_how_many_prompts_are_drawn_is_said(result):
    assert "all 4 prompts" in picture._figure(result).axes[0].get_title()
    many = dataclasses.replace(result, per_prompt=result.per_prompt * 16)
    figure = picture._figure(many)
    assert "the 30 of 64 prompts with the largest shares" in figure.axes[0].get_title()
    assert len(figure.axes[0].get_yticks()) == 31


def test_texts_of_prompts_are_no_mathematics(result, tmp_path):
    odd = dataclasses.replace(result.per_prompt[0], prompt="$\\frac{ [red] \x1b[31m")
    write_picture(dataclasses.replace(result, per_prompt=(odd,)), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
