"""A heat map draws every cell once, in its colour."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from entropy_fast.report.html.heat import NAMED_CELLS, heat_map, legend_of, step_name
from entropy_fast.report.html.scales import level_of


def drawn(figure) -> np.ndarray:
    """What the paths cover: the name of the step by cell."""
    cells = np.full((figure.n_rows, figure.n_columns), "", dtype=object)
    for step in figure.steps:
        pieces = re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", step.path)
        assert "".join(f"M{x} {y}h{w}v1h-{back}z" for x, y, w, back in pieces) == step.path
        for x, y, width, back in pieces:
            assert width == back
            for column in range(int(x), int(x) + int(width)):
                assert cells[int(y), column] == ""
                cells[int(y), column] = step.name
    return cells


@settings(deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.floats(-1, 1) | st.just(np.nan)))
def test_every_cell_has_its_colour(values):
    rows, columns = ([f"{what} {n}" for n in range(size)] for what, size in zip(("r", "c"), values.shape, strict=True))
    figure = heat_map(values, rows, columns, unit="nats", title="t")
    known = np.abs(values[np.isfinite(values)])
    largest = known.max() if known.size else 0.0
    expected = [[step_name(level_of(value, largest)) for value in row] for row in values]
    assert drawn(figure).tolist() == expected
    assert {(cell.row, cell.column) for cell in figure.cells} == set(zip(*np.nonzero(np.isfinite(values)), strict=True))
    assert len(figure.legend.marks) == 5


def test_a_mark_stands_under_the_colour_of_its_number():
    legend = legend_of(0.8, "nats")
    assert legend.marks == ("−0.80", "−0.20", "0", "+0.20", "+0.80")
    middle = len(legend.steps) // 2
    for mark, number in enumerate((-0.8, -0.2, 0.0, 0.2, 0.8)):
        assert level_of(number, 0.8) == (mark - 2) * middle // 2


def test_large_tables_are_small():
    values = np.random.default_rng(0).normal(size=(128, 128))
    names = [f"#{n}" for n in range(128)]
    figure = heat_map(values, names, names, unit="nats", title="t")
    assert sum(len(step.path) for step in figure.steps) < 400_000
    assert figure.cells == () and values.size > NAMED_CELLS
    assert 8 <= len(figure.row_labels) <= 48
    assert 4 <= sum(not label.minor for label in figure.row_labels) <= 12
    assert [label.text for label in figure.row_labels][:2] == ["#0", "#3"]
