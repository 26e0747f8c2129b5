"""The page in a browser: silent, still, nothing wider than the window, readable in both colour schemes, at every width."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import CHROMIUM, WIDTHS, browser
from report_pages import full_run, hostile_run

from entropy_fast.report.html import write_report

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]

PRINT = 688  # pixels: A4 less the margins of the style sheet, at 96 to the inch
SIZES = [(*size, "") for size in WIDTHS.values()] + [(PRINT, 1000, "print"), (320, 568, "")]


@pytest.fixture(scope="module")
def window():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = {"one": [full_run()], "hostile": [hostile_run()], "several": [full_run(), hostile_run()]}
    return {name: write_report(found, folder / f"{name}.html") for name, found in runs.items()}


@pytest.mark.parametrize("name", ["one", "hostile", "several"])
@pytest.mark.parametrize(("width", "height", "media"), SIZES)
def test_it_is_silent_asks_for_nothing_and_fits(window, pages, name, width, height, media):
    for dark in (False, True):
        seen = window.open(pages[name], width, height, dark=dark, media=media)
        assert (seen.messages, seen.requests, seen.wide, seen.overflow) == ([], [], [], 0)
    assert window.evaluate("document.title").startswith("Entropy forecast")
    assert window.evaluate("document.scripts.length + document.images.length") == 0


def test_what_the_test_above_looks_for_is_seen(window, tmp_path):
    """A script that may not run, a picture from elsewhere, and a box that is too wide."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><meta http-equiv='Content-Security-Policy' content=\"script-src 'none'\"><title>x</title>"
        "<script>document.title = 'ran'</script><img src='http://127.0.0.1:9/x.png' alt=''><div><svg width='2000'></svg></div>"
    )
    seen = window.open(bad, 390, 844)
    assert any("Content Security Policy" in message for message in seen.messages)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert seen.overflow > 1500 and seen.wide
    assert window.evaluate("document.title") == "x"


CONTRAST = """(() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const seen = (...layers) => {
    context.clearRect(0, 0, 1, 1);
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => rgb.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [.2126, .7152, .0722][n], 0);
  const paper = getComputedStyle(document.documentElement).backgroundColor;
  let least = 99;
  for (const element of document.querySelectorAll('SELECTOR')) {
    const style = getComputedStyle(element);
    let back = [];
    for (let above = element; above; above = above.parentElement) back.unshift(getComputedStyle(above).backgroundColor);
    const [a, b] = [light(seen(paper, ...back)), light(seen(paper, ...back, style.color))].sort((x, y) => y - x);
    least = Math.min(least, (a + .05) / (b + .05));
  }
  return least;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_have_contrast(window, pages, dark):
    """At least 4.5 to 1, which WCAG 2 asks of texts, tokens on their colours among them."""
    window.open(pages["one"], dark=dark)
    for selector in (".tokens i", "p, th, td, dt, dd, li, summary, b, small, figcaption, label, legend"):
        assert window.evaluate(CONTRAST.replace("SELECTOR", selector)) >= 4.5, selector
    window.evaluate("document.querySelector('.pick-second').click()")
    assert window.evaluate(CONTRAST.replace("SELECTOR", ".tokens i")) >= 4.5


def test_a_token_says_its_numbers_and_the_other_colours_can_be_chosen(window, pages):
    window.open(pages["one"])
    token = "document.querySelector('.tokens i[tabindex]')"
    said = f"getComputedStyle({token}, '::after').content"
    assert window.evaluate(said) == "none"
    window.evaluate(f"{token}.focus()")
    a, b = (window.evaluate(f"{token}.dataset.{name}") for name in "ab")
    shown = window.evaluate(said)
    assert shown in (f'"direct {a} · visitation {b}"', f'"direct " "{a}" " · visitation " "{b}"')
    assert window.evaluate(f"getComputedStyle({token}, '::after').position") == "fixed"
    colours = "[...document.querySelectorAll('.tokens i')].map(e => getComputedStyle(e).backgroundColor).join()"
    before = window.evaluate(colours)
    window.evaluate("document.querySelector('.pick-second').click()")
    assert window.evaluate(colours) != before
    assert window.evaluate("[...document.querySelectorAll('.legend.second')].every(e => e.offsetHeight > 0)")
    assert window.evaluate("[...document.querySelectorAll('.legend.first')].every(e => e.offsetHeight == 0)")


def test_it_prints(window, pages, tmp_path):
    window.open(pages["one"])
    window.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
