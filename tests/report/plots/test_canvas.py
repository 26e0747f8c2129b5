"""Figures are nobody else's: no registry, no settings, no backend is touched, and a user's axes are used."""

from __future__ import annotations

import sys
import warnings

import matplotlib
import pytest
from artists import texts
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from shown_results import HOSTILE, full

from entropy_fast.errors import MissingPackageError
from entropy_fast.truth import EntropyLedger

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def ledger():
    found = EntropyLedger()
    for step in range(3):
        found.record(step, forecast=step / 10, std_error=0.1, realised=step / 11, realised_error=0.01, unit="nats")
    return found


DRAWN = {
    "parts": lambda **given: full().plot.parts(**given),
    "step_parts": lambda **given: full().plot.step_parts(**given),
    "updates": lambda **given: full().plot.updates(**given),
    "prompts": lambda **given: full().plot.prompts(**given),
    "layers": lambda **given: full().plot.layers(**given),
    "kernel": lambda **given: full().plot.kernel(**given),
    "tokens": lambda **given: full().plot.tokens(0, 0, **given),
    "steps": lambda **given: ledger().plot.steps(**given),
    "calibration": lambda **given: ledger().plot.calibration(**given),
}


def settings():
    with warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else warnings.catch_warnings():
        return {name: matplotlib.rcParams._get(name) for name in matplotlib.rcParams}, set(matplotlib.colormaps)


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_global_changes_and_nothing_is_kept(name, monkeypatch):
    before = settings()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    ax = DRAWN[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture, size = ax._repr_png_()
    assert picture.startswith(b"\x89PNG") and size["width"] > 200 < size["height"]
    assert settings() == before
    assert isinstance(ax.figure.canvas, FigureCanvasAgg)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("parts", "kernel", "calibration") else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in DRAWN
    ],
)
def test_a_user_s_axes_are_drawn_into_and_given_back(name):
    figure = Figure(figsize=(12, 5))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    assert DRAWN[name](ax=right) is right
    assert right.has_data() and not left.has_data()
    figure.canvas.draw()


def test_pages_take_a_figure_of_the_user():
    figure = Figure(figsize=(14, 18), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1)
    assert full().plot(above) is above and ledger().plot(figure=below) is below
    assert len(figure.axes) == 5 + 2


def test_text_of_others_is_drawn_as_text():
    said = texts(full().plot.kernel().figure)
    assert "\x1b" not in said and "\u202e" not in said
    assert HOSTILE.startswith("</script>") and "</script>" in said


def test_without_matplotlib_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for owner, what in ((full(), "result.plot"), (ledger(), "ledger.plot")):
        with pytest.raises(MissingPackageError, match=f"{what}: matplotlib is not installed"):
            owner.plot()
