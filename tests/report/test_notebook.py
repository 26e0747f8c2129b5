"""What a notebook shows is small, needs nothing, and no text of others acts in it."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shown_results import HOSTILE, bare, full, two_batches, unknown_errors

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")

TAGS = {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "details", "summary"}
DRAWING = {"svg", "line", "circle"}
ATTRIBUTES = {"style", "scope", "width", "height", "aria-hidden", "x1", "x2", "y1", "y2", "cx", "cy", "r"}
PAINT = {"stroke", "stroke-opacity", "stroke-width", "fill", "fill-opacity"}


class Read(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def inert(result) -> Read:
    shown = result._repr_html_()
    found = Read(shown)
    assert not found.open
    assert {tag for tag, _ in found.tags} <= TAGS | DRAWING
    for _, attributes in found.tags:
        assert set(attributes) <= ATTRIBUTES | PAINT
        assert not any("url" in str(value) for value in attributes.values())
    assert shown.isprintable() and len(shown) < 20_000
    return found


def test_it_says_what_the_result_says():
    result = full()
    found = inert(result)
    assert (
        result.verdict.sentence in found.text
        and result.unit in found.text
        and "direct" in found.text
        and "visitation" in found.text
    )
    for part in (result.split.direct, result.split.visitation, result.split.total):
        numbers = [format(number, "+.3g").replace("-", "−") for number in (part.value, *part.interval())]
        assert f"{numbers[0]}[{numbers[1]}, {numbers[2]}]" in found.text
    assert sum(tag == "circle" for tag, _ in found.tags) == 3
    x = [float(attributes["cx"]) for tag, attributes in found.tags if tag == "circle"]
    values = [part.value for part in (result.split.direct, result.split.visitation, result.split.total)]
    assert sorted(range(3), key=x.__getitem__) == sorted(range(3), key=values.__getitem__)


def test_texts_of_others_are_text():
    result = full()
    odd = tuple(dataclasses.replace(unit, prompt=HOSTILE) for unit in result.per_prompt)
    diagnostics = dataclasses.replace(result.diagnostics, warnings=(f"note {HOSTILE}",))
    found = inert(dataclasses.replace(result, per_prompt=odd, diagnostics=diagnostics))
    shown = '</script><img src=x onerror=alert(1)>[31mdrow $\\frac{ & "quoted"'
    assert found.text.count(shown) == 4 and f"note {shown}" in found.text


@given(st.text(st.characters()))
def test_any_prompt_and_note_is_text(text):
    result = full()
    units = tuple(dataclasses.replace(unit, prompt=text) for unit in result.per_prompt)
    diagnostics = dataclasses.replace(result.diagnostics, warnings=(text,) * 30)
    inert(dataclasses.replace(result, per_prompt=units, diagnostics=diagnostics))


def test_what_is_not_known_is_said_and_not_drawn():
    found = inert(unknown_errors(full()))
    assert found.text.count("unknown") == 3
    assert sum(tag == "line" for tag, _ in found.tags) == 3  # the zero of each scale
    assert sum(tag == "circle" for tag, _ in inert(two_batches()).tags) == 1
    assert sum(tag == "circle" for tag, _ in inert(bare()).tags) == 1


def test_of_many_notes_some_are_shown_and_the_rest_are_counted():
    diagnostics = dataclasses.replace(full().diagnostics, warnings=("x" * 10_000,) * 9)
    assert "and 3 more" in inert(dataclasses.replace(full(), diagnostics=diagnostics)).text
