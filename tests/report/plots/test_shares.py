"""Bars are the shares of the result."""

from __future__ import annotations

import dataclasses

import pytest
from artists import bars, columns, lines, rows, texts
from matplotlib.colors import same_color
from shown_results import bare, full, prompts, static_blocks, two_batches

from entropy_fast.errors import ConfigError, ResultError
from entropy_fast.report.plots.canvas import LOWERS, RAISES

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def test_prompts_by_the_size_of_their_shares():
    result = full()
    ax = result.plot.prompts(limit=3)
    ranked = sorted(range(5), key=lambda n: -abs(result.per_prompt[n].delta_h1))[:3]
    assert [width for _, width in bars(ax)] == [result.per_prompt[n].delta_h1 for n in ranked]
    assert lines(ax, "_direct") == [([float(result.split.direct.by_unit[n]) for n in ranked], [0.0, 1.0, 2.0])]
    plain = [text for text in (prompts()[n] for n in ranked) if text.isalpha()]
    assert [text for text in rows(ax) if text.isalpha()] == plain
    assert "the 3 that matter most" in texts(ax.figure) and "all 5 prompts" in texts(ax.figure)
    for bar in ax.patches:
        assert same_color(bar.get_facecolor(), LOWERS if bar.get_width() < 0 else RAISES)


def test_prompts_of_one_part():
    result = full()
    ax = result.plot.prompts("visitation")
    shares = result.split.visitation.by_unit.tolist()
    assert [width for _, width in bars(ax)] == sorted(shares, key=lambda share: -abs(share))
    assert "visitation" in ax.get_xlabel() and lines(ax, "_direct") == []


def test_blocks_and_the_two_batches():
    assert len(bars(static_blocks().plot.prompts())) == 3
    result = two_batches()
    shares = sorted(result.forecast.by_unit.tolist(), key=lambda share: -abs(share))
    assert [width for _, width in bars(result.plot.prompts())] == shares
    with pytest.raises(ResultError, match="update prompts"):
        result.plot.prompts(updates=True)
    update = [dataclasses.replace(unit, role="update", delta_h1=2 * unit.delta_h1) for unit in result.per_prompt]
    both = dataclasses.replace(result, per_prompt=(*result.per_prompt, *update))
    drawn = [width for _, width in bars(both.plot.prompts(updates=True))]
    assert drawn == sorted((unit.delta_h1 for unit in update), key=lambda share: -abs(share))
    with pytest.raises(ConfigError, match="no share of a part"):
        both.plot.prompts("direct", updates=True)
    with pytest.raises(ConfigError, match="at least 1"):
        both.plot.prompts(limit=0)


def test_texts_of_prompts_are_drawn_as_they_stand_and_do_nothing():
    result = full()
    ax = result.plot.prompts()
    [odd] = [text for text in rows(ax) if "script" in text]
    assert odd.startswith("</script><img src=x onerror=alert(1)>[31mdrow $")
    ax.figure.canvas.draw()  # as mathematics it would not parse


def test_layers_of_both_parts_and_of_one():
    result = full()
    ax = result.plot.layers()
    layers = result.by_layer
    heights = [height for _, height in columns(ax)]
    direct, visitation = (list(part.by_layer.values()) for part in (result.split.direct, result.split.visitation))
    assert heights == [*direct, *visitation]
    assert lines(ax, "total") == [(list(map(float, range(len(layers)))), list(layers.values()))]
    shown = [label.get_text() for label in ax.get_xticklabels()]
    assert {"0", "1", "tokens", "head"} <= set(shown) and result.unit in ax.get_ylabel()
    assert [height for _, height in columns(result.plot.layers("direct"))] == direct
    with pytest.raises(ResultError, match="engine='one_pass'"):
        two_batches().plot.layers()
    assert [height for _, height in columns(bare().plot.layers())] == list(bare().by_layer.values())


def test_of_many_layers_a_few_are_numbered():
    result = full()
    shares = {f"model.layers.{n}.weight": float(n) for n in range(40)} | {"model.norm.weight": 1.0}
    forecast = dataclasses.replace(result.forecast, by_parameter=shares)
    split = {
        name: dataclasses.replace(getattr(result.split, name), by_parameter=shares) for name in ("direct", "visitation")
    }
    ax = dataclasses.replace(result, forecast=forecast, split=dataclasses.replace(result.split, **split)).plot.layers()
    assert [label.get_text() for label in ax.get_xticklabels()] == [*map(str, range(0, 40, 2)), "norm"]
