"""The picture that goes with a result's files is what ``result.plot`` draws."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from artists import bars, lines, texts
from shown_results import full

from entropy_fast.errors import MissingPackageError, ResultError
from entropy_fast.report.picture import require_matplotlib, write_picture
from entropy_fast.report.plots import overview
from entropy_fast.report.plots.overview import contributions

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def test_intervals_and_bars_are_those_of_the_figures():
    parts, prompts = contributions(full()).axes
    assert lines(parts, "_interval") == lines(full().plot.parts(), "_interval")
    assert [x for x, _ in lines(parts, "_interval")][-1] == list(full().interval(0.95))
    assert bars(prompts) == bars(full().plot.prompts())


def test_how_many_prompts_are_drawn_is_said():
    result = full()
    shares = result.forecast.by_unit.repeat(13)
    split = {part: dataclasses.replace(getattr(result.split, part), by_unit=shares) for part in ("total", "direct")}
    many = dataclasses.replace(
        result,
        per_prompt=result.per_prompt * 13,
        forecast=dataclasses.replace(result.forecast, by_unit=shares),
        split=dataclasses.replace(result.split, **split),
    )
    figure = contributions(many)
    assert len(bars(figure.axes[1])) == 30
    assert "the 30 that matter most" in texts(figure) and "all 65 prompts" in texts(figure)


def test_it_is_written_whatever_its_texts_are(tmp_path):
    odd = dataclasses.replace(full(), per_prompt=full().per_prompt[1:2] * 5)
    assert write_picture(odd, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_or_with_a_broken_one_it_is_said(tmp_path, monkeypatch):
    def broken(result):
        raise RuntimeError("no fonts")

    with monkeypatch.context() as patch:
        patch.setattr(overview, "contributions", broken)
        with pytest.raises(ResultError, match="no fonts"):
            write_picture(full(), tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="matplotlib is not installed"):
        write_picture(full(), tmp_path / "p.png")
    said = require_matplotlib(quiet=True)
    assert said is not None and "--no-picture" in said and not list(tmp_path.iterdir())
