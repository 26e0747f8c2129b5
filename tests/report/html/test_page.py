"""The page itself: nothing acts in it or is loaded, whatever texts it shows; it can be read without seeing it."""

from __future__ import annotations

import base64
import hashlib
import re
from itertools import pairwise
from pathlib import Path

import pytest
from html_page import Page
from report_pages import HOSTILE, full_run, hostile_run
from saved_results import made_responses, made_result, made_run

from entropy_fast.report.html import report_html, write_report
from entropy_fast.run_folder.run_reading import SavedRun
from entropy_fast.truth import EntropyLedger

FORBIDDEN = {
    "script",
    "iframe",
    "object",
    "embed",
    "img",
    "form",
    "base",
    "a:href",
    "audio",
    "video",
    "foreignobject",
    "use",
}


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report_html([full_run()]))


@pytest.fixture(scope="module")
def hostile() -> str:
    return report_html([hostile_run(), hostile_run()])


def checked_policy(page: Page) -> str:
    [policy] = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    return policy.attributes["content"]


def test_the_policy_lets_its_own_style_act_and_nothing_else(page):
    [style] = page.all("style")
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    assert checked_policy(page) == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    # The policy stands before all that it is about.
    assert [element.tag for element in page.elements[:4]] == ["html", "head", "meta", "meta"]
    assert "url(" not in style.text and "@import" not in style.text


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_nothing_in_it_acts_or_is_loaded(which, page, hostile):
    found = page if which == "page" else Page(hostile)
    for element in found.elements:
        assert element.tag not in FORBIDDEN, element
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in (
                "style",
                "src",
                "srcset",
                "action",
                "ping",
                "autofocus",
            ), element
            if name in ("href", "xlink:href"):
                assert value.startswith("#") or (element.tag, value) == ("link", "data:,"), element
    assert len(found.all("style")) == 1
    assert "sha256" in checked_policy(found)


def test_hostile_texts_are_text(hostile):
    found = Page(hostile)
    [body] = found.all("body")
    for shown in (
        HOSTILE[0],
        HOSTILE[1],
        HOSTILE[2],
        HOSTILE[3],
        HOSTILE[4],
        HOSTILE[5].partition("&#")[0],
        HOSTILE[8],
    ):
        assert shown in body.text
    assert r"\u202eright to left\u2066\u2069\u200f\u061c" in body.text
    assert r"\x00\x07\x1b[31m\x7f\x85\ud800\ufeff" in body.text
    assert "a" * 161 not in body.text
    assert "(10,000 characters)" in body.text
    assert "49" not in [piece.text for piece in found.all("i")]
    hostile.encode("utf-8")
    for character in hostile:
        assert character in "\n\u00a0" or character.isprintable(), repr(character)


def test_ids_are_unique_and_links_lead_somewhere(hostile):
    found = Page(hostile)
    ids = [element.attributes["id"] for element in found.elements if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    for element in found.elements:
        for name in ("aria-labelledby", "for"):
            for target in element.attributes.get(name, "").split():
                assert target in ids, element
        if element.tag == "a":
            assert element.attributes["href"][1:] in ids
    # Every section that the contents name is there, and the other way round.
    for number in (1, 2):
        contents = {
            a.attributes["href"][1:]
            for a in found.all("a")
            if a.within("nav") and f"run-{number}-" in a.attributes["href"]
        }
        headings = {i for i in ids if re.fullmatch(rf"run-{number}-[a-z]+", i)} - {f"run-{number}-name"}
        assert contents == headings


def test_it_can_be_read_without_seeing_it(page):
    [html] = page.all("html")
    assert html.attributes["lang"] == "en"
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("header")) == len(page.all("footer")) == 1
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch("h[1-6]", e.tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for table in page.all("table"):
        heads = [e for e in page.all("th") if e.within("table")]
        assert heads and all(e.attributes.get("scope") in ("col", "row") for e in heads)
        assert table.attributes.get("role") != "table" or all(
            row.attributes.get("role") == "row"
            for row in page.all("tr")
            if row.parent.parent is table and row.parent.tag != "tfoot"
        )
    for figure in page.all("svg"):
        if figure.attributes.get("aria-hidden") == "true" or figure.within("svg"):
            continue
        assert figure.attributes["role"] == "img" and figure.attributes["aria-labelledby"]
        assert figure.children[0].tag == "title" and len(figure.children[0].text) > 10
    for region in page.all(role="region"):
        assert region.attributes["tabindex"] == "0"
        assert region.attributes.get("aria-label") or region.attributes["aria-labelledby"]
    # Colour is never alone: signs are written, and strong tokens have a line.
    assert "sign not established" in page.all("main")[0].text


def test_tokens_the_keyboard_stops_at(page):
    responses = [element for element in page.all("p", class_="tokens") if element.children]
    assert len(responses) == 15
    for response in responses:
        tokens = [e for e in response.children if e.tag == "i"]
        assert len(tokens) == 6
        assert sum(e.attributes.get("tabindex") == "0" for e in tokens) == 3
        assert all({"data-a", "data-b"} <= set(e.attributes) for e in tokens)
        assert "".join(e.text for e in tokens) == "".join(f" word{t}" for t in range(6))


def test_every_section_is_there(page):
    titles = [e.text for e in page.elements if e.tag == "h2"]
    assert titles == [
        "Direct and visitation", "What the step consists of", "Updates compared", "What else changes",
        "What the step really did",
        "Forecast and realised over the steps of the run", "Prompts", "Responses", "Prompt against prompt",
        "Layers and modules", "Log-probs that are off", "How it was computed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"split": None, "step_parts": {}, "updates": {}, "functionals": {}, "kernel": None, "geometry": "adam_static"},
        {"kernel": None, "diagonal": None, "per_prompt": ()},
    ],
)
def test_what_is_not_known_is_said_or_left_out(changes):
    result = made_result(4, **changes)
    found = Page(report_html([made_run(result)]))
    text = found.all("main")[0].text
    assert "holds no responses.parquet" in text
    assert "There is no table of what every prompt's update does" in text
    assert "nan" not in text.lower().split() and "None" not in text


def test_a_report_is_written_whole(tmp_path: Path, monkeypatch):
    path = write_report([full_run()], tmp_path / "report.html")
    before = path.read_bytes()
    assert before.startswith(b"<!doctype html>") and before.rstrip().endswith(b"</html>")
    monkeypatch.setattr(Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        write_report([full_run()], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


WORDS, MARKUP, WIDE = (lambda i, t: f" word{(7 * i + t) % 997}"), (lambda i, t: "<&>" * 60), (lambda i, t: "漢字" * 50)
LONG = [pytest.param(300, piece, marks=pytest.mark.exhaustive) for piece in (WORDS, MARKUP, WIDE)]


@pytest.mark.parametrize(("tokens", "piece"), [(30, MARKUP), *LONG])
def test_a_large_result_is_a_page_of_less_than_5_mb(tokens, piece):
    """128 prompts with 16 responses; more is known than fits, and the page says what it left out."""

    def text(n: int, i: int) -> str:
        return f"Question {n}: " + "漢字<&> " * 400

    result = made_result(128, 16, text=text)
    page = report_html([made_run(result, made_responses(128, 16, tokens, text=text, piece=piece))])
    assert len(page.encode()) < 5_000_000
    shown = page.count('<p class="tokens"')
    assert f"{shown} of 2048 responses are shown" in page
    assert shown >= 10


def test_a_key_names_only_what_is_drawn():
    book = EntropyLedger()
    for step in range(3):
        book.record(step, part="visitation", forecast=0.1 * step, std_error=0.01)
    run = full_run()
    found = Page(report_html([SavedRun(run.path, None, (book,), (), {})]))
    assert "forecast, 95 %" in found.all("main")[0].text and "realised, ±" not in found.all("main")[0].text
    assert "realised, ±" in Page(report_html([run])).all("main")[0].text
