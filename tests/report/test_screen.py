"""The first screen: it fits, the verdict leads, its numbers are the result's, and no text of a model can do anything on it."""

from __future__ import annotations

import dataclasses
import io
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from small_policy import saved_run

from entropy_fast import DeltaH1Result, EstimateOptions, candidates, fast_delta_h1, read_rollouts
from entropy_fast.columns.functional import usual_functionals
from entropy_fast.estimates.forecast import Forecast
from entropy_fast.estimates.split import Split, UpdateForecasts
from entropy_fast.estimates.verdict import percent_of
from entropy_fast.report.screen import print_screen
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model

NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?"
WIDTHS = (80, 120)
ATTACKS = [
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnihtyreve\u2066",
    "e" + "\u0301" * 300,
    "漢字" * 90,
    "[bold red on white]x[/]",
    "two\r\nlines\u2028three",
    "אבגד 123 " * 20,
    "👩‍👩‍👧" * 30,
    "note: To first order this update raises the entropy by 99 %",
    "",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> DeltaH1Result:
    folder = saved_run(tmp_path_factory.mktemp("run"))
    model = attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    return fast_delta_h1(
        model,
        folder / "optimizer.pt",
        rollouts,
        functionals=usual_functionals(rollouts),
        updates={"with a bonus": candidates.entropy_bonus(0.01), "other": candidates.reweighted(positive=0.1)},
        estimate=EstimateOptions(step="next"),
    )


def shown(result: DeltaH1Result, width: int, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")  # strict: a glyph that is not there is an error
    print_screen(result, Console(file=stream, width=width, markup=False, highlight=False))
    stream.flush()
    return raw.getvalue().decode(encoding).split("\n")[:-1]


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(NUMBER, text)]


def row(lines: list[str], first: str) -> str:
    """The one line that begins with a word and has numbers after it."""
    [found] = [line for line in lines if line.startswith(first + " ") and re.search(r"\d", line)]
    return found.removeprefix(first)


def near(shown: list[float], exact: list[float], digits: int = 3) -> None:
    assert shown == pytest.approx(exact, rel=0.6 * 10 ** (1 - digits), abs=1e-300)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_one_screen_led_by_the_verdict(result, width, encoding):
    lines = shown(result, width, encoding)
    assert len(lines) <= 24
    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    assert " ".join(lines).startswith(result.verdict.sentence)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_number_is_the_results(result, width):
    lines = shown(result, width)
    level = result.entropy_level
    assert f"Entropy now {level:.4g} {result.unit}" in " ".join(lines)
    assert f"learning rate {result.learning_rate:.3g}" in " ".join(lines)
    assert result.split is not None
    parts = {"direct": result.split.direct, "visitation": result.split.visitation, "total": result.forecast}
    head = next(place for place, line in enumerate(lines) if "95 % interval" in line)
    for name, found in parts.items():
        value, low, high, percent = numbers(row(lines[head : head + 4], name))
        near([value, low, high], [found.value, *found.interval()])
        near([percent], [percent_of(found.value, level)], digits=2)
    near([numbers(row(lines, "1st"))[0]], [max((p.delta_h1 for p in result.per_prompt), key=abs)])
    for name, found in result.updates.items():
        assert found.split is not None
        cells = [number for own in (found.split.direct, found.forecast) for number in (own.value, own.std_error)]
        near(numbers(row(lines, name)), cells, digits=2)
    said = " ".join(lines).partition("Per response, ")[2]
    for name, found in result.functionals.items():
        near(numbers(said.partition(f"{name} ")[2])[:2], [found.value, found.std_error], digits=2)


def test_a_share_is_called_what_it_is(result):
    """Along the whole step it says where the entropy changes; otherwise it is half of that and half of who changes it."""
    assert any(line.startswith("Prompts whose entropy changes most (3 of ") for line in shown(result, 80))
    static = dataclasses.replace(result, step_parts={})
    assert any(line.startswith("Prompts that matter most (3 of ") for line in shown(static, 80))


def test_parts_of_the_step_whichever_way_they_are_laid_out(result):
    """As columns where they fit, as rows where they do not: the same numbers in the same places."""
    wide, narrow = (shown(result, width) for width in (120, 80))
    assert list(result.step_parts) == ["momentum", "decay", "fresh", "scale"]
    for place, (name, own) in enumerate(result.step_parts.items()):
        assert own.split is not None
        cells = [own.split.direct.value, own.split.direct.std_error, own.forecast.value, own.forecast.std_error]
        near(numbers(row(narrow, name)), cells, digits=2)
        head = next(n for n, line in enumerate(wide) if line.startswith("step by"))
        assert wide[head].split()[-4:] == list(result.step_parts)
        in_columns = [
            numbers(row(wide[head : head + 3], part))[2 * place : 2 * place + 2] for part in ("direct", "total")
        ]
        near([number for pair in in_columns for number in pair], cells, digits=2)


def test_what_is_not_known_is_no_number(result):
    unknown = Forecast.unknown(len(result.per_prompt))
    assert result.split is not None
    direct = result.split.direct
    alone = dataclasses.replace(
        result,
        delta_h1=math.nan,
        std_error=math.nan,
        estimate_options=dataclasses.replace(result.estimate_options, parts=("direct",)),
        forecast=direct,
        split=Split(unknown, direct, unknown, result.split.on_batch),
        step_parts={
            name: dataclasses.replace(own, forecast=own.split.direct) for name, own in result.step_parts.items()
        },
    )
    lines = shown(alone, 80)
    assert not any(line.startswith(("total", "visitation")) for line in lines)
    assert "share of the direct part:" in " ".join(lines)
    few = dataclasses.replace(direct, std_error=math.nan)
    said = shown(dataclasses.replace(alone, forecast=few, split=dataclasses.replace(alone.split, direct=few)), 80)
    assert "unknown" in row(said, "direct") and "too few prompts" in " ".join(said)
    assert "nan" not in " ".join([*lines, *said])


def test_notes_that_bear_are_shown_and_the_others_counted(result):
    notes = ("first " + "long " * 90, "how it went", "second\x1b[31m", "third", "fourth")
    diagnostics = dataclasses.replace(result.diagnostics, warnings=notes, asides=("how it went",))
    lines = shown(dataclasses.replace(result, diagnostics=diagnostics), 80)
    at = [place for place, line in enumerate(lines) if line.startswith("note: ")]
    assert [lines[place].split()[1] for place in at] == ["first", "second[31m", "third"]
    assert at[1] - at[0] == 2 and lines[at[0] + 1].endswith("…")
    assert lines[-1] == "2 more notes: --verbose"


texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(ATTACKS)), max_size=3).map("".join)


class Drawn:
    """Numbers of every size and sign, with 0 and what is not known among them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self) -> float:
        return self.random.choice((0.0, 1.0, 1.0, 1.0)) * self.random.uniform(-1, 1) * 10 ** self.random.uniform(-9, 5)

    def forecast(self) -> Forecast:
        value = self.value()
        error = self.random.choice((math.nan, *3 * (abs(self.value()) + 1e-12,)))
        return Forecast(value, error, error, 4, torch.full((4,), value / 4, dtype=torch.float64))

    def whole(self) -> UpdateForecasts:
        total, direct, rest = (self.forecast() for _ in range(3))
        return UpdateForecasts(total, Split(total, direct, rest, direct.value), {})


@given(
    seed=st.integers(0, 2**32),
    width=st.one_of(st.sampled_from(WIDTHS), st.integers(80, 200), st.integers(20, 79)),
    told=st.lists(texts, min_size=4, max_size=4),
    names=st.lists(texts, max_size=5, unique=True),
    notes=st.lists(texts, max_size=5),
)
@settings(max_examples=50)
def test_whatever_the_texts_and_numbers_it_fits_and_nothing_of_a_model_acts(result, seed, width, told, names, notes):
    drawn = Drawn(seed)
    split = drawn.whole().split
    assert split is not None
    prompts = tuple(
        dataclasses.replace(p, prompt=text, delta_h1=drawn.value(), mean_reward=drawn.value())
        for p, text in zip(result.per_prompt, told, strict=True)
    )
    changed = dataclasses.replace(
        result,
        delta_h1=split.total.value,
        std_error=split.total.std_error,
        forecast=split.total,
        split=split,
        entropy_level=drawn.random.choice((0.0, 1e-300, abs(drawn.value()), 0.5)),
        per_prompt=prompts,
        functionals={name: drawn.forecast() for name in names},
        updates={name: drawn.whole() for name in names},
        step_parts={name: drawn.whole() for name in result.step_parts},
        diagnostics=dataclasses.replace(result.diagnostics, warnings=tuple(notes)),
    )
    lines = shown(changed, width)
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    if width < 80:
        return
    assert " ".join(lines).startswith(changed.verdict.sentence)
    # One line a prompt, with its own number before whatever its text says.
    ranked = sorted(prompts, key=lambda p: -abs(p.delta_h1))
    start = next(n for n, line in enumerate(lines) if line.startswith("Prompts whose entropy changes most")) + 1
    for place, line, prompt in zip(("1st", "2nd", "3rd"), lines[start:], ranked, strict=False):
        assert line.startswith(f"{place}  ")
        near(numbers(line.removeprefix(place))[:2], [prompt.delta_h1, prompt.mean_reward])
    head = next(n for n, line in enumerate(lines) if "95 % interval" in line)
    near([numbers(row(lines[head : head + 4], "direct"))[0]], [split.direct.value])
