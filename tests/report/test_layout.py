"""Lines for a terminal: columns that line up in cells, sentences that are cut and not broken, paths that are neither."""

from __future__ import annotations

import io
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from entropy_fast.report.layout import files_line, grid, grid_that_fits, wrapped

cells = st.text("ab1漢 .", max_size=6)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_columns_line_up_by_cells(rows):
    lines = grid([[*row, "|"] for row in rows])
    assert len({cell_len(line) for line in lines}) == 1
    for row, line in zip(rows, lines, strict=True):
        assert line.split() == " ".join([*row, "|"]).split()


def test_a_grid_is_turned_where_that_fits_and_it_does_not():
    rows = [["name", "a" * 30, "b" * 30], ["value", "1", "2"]]
    assert grid_that_fits(rows, 80) == grid(rows)
    assert grid_that_fits(rows, 60) == grid([list(column) for column in zip(*rows, strict=True)])
    assert grid_that_fits(rows, 20) == grid(rows)


@given(st.text(max_size=300), st.integers(10, 60), st.integers(1, 4))
def test_a_sentence_has_no_more_lines_than_it_may(text, width, lines):
    console = Console(file=io.StringIO(), width=width)
    found = wrapped(text, console, lines=lines, cut="…").plain.split("\n")
    assert len(found) <= lines
    assert all(cell_len(line) <= width and line.isprintable() and line == line.rstrip() for line in found)


def test_a_sentence_that_is_cut_says_so():
    console = Console(file=io.StringIO(), width=10)
    assert wrapped("one two three four", console, lines=9, cut="…").plain == "one two\nthree four"
    assert wrapped("one two three four five", console, lines=2, cut="...").plain == "one two\nthree f..."


def test_paths_are_whole():
    paths = [Path("/a/run") / name for name in ("result.json", "p.png")]
    assert files_line(paths, 80).plain == "written to /a/run: result.json, p.png"
    assert files_line(paths, 20).plain == "written: result.json, p.png\nto /a/run"
    assert "\x1b" not in files_line([Path("/a/\x1b[2J/b")], 80).plain
