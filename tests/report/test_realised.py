"""What the step did beside its forecast: which column is which, and what was not tested."""

from __future__ import annotations

import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console
from saved_results import made_result

from entropy_fast.report.realised import print_realised
from entropy_fast.truth import RealisedChange, RealisedChanges
from entropy_fast.truth.measuring import Symmetric

NAN = math.nan
UNTESTED = "This tests the direct part alone, at these responses, not the visitation part."


def found(total: float = NAN) -> RealisedChanges:
    points = tuple(
        RealisedChange(
            eta,
            -0.0110001 * eta,
            total,
            0.1,
            NAN,
            Symmetric(-0.010 * eta, total, 0.1),
            -0.001 * eta,
            0.9,
            0.2,
            False,
            eta < 1,
        )
        for eta in (1.0, 0.1)
    )
    return RealisedChanges(points, 1.4, 1e-6, 1e-4, "next_step", 1.0)


def shown(result, found: RealisedChanges, *, verbose: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=200 if verbose else 80, color_system=None, markup=False, highlight=False
    )
    print_realised(result, found, console, verbose=verbose)
    return console.file.getvalue().splitlines()


def test_what_really_happened_stands_first_and_both_ways_is_explained():
    result = made_result()
    lines = shown(result, found())
    assert max(map(cell_len, lines)) <= 80
    assert lines[1].split("  ")[-4:] == ["direct forecast", "step taken", "both ways", "both ways / forecast"]
    forecast = result.split.on_batch
    assert lines[2].split() == ["1", f"{forecast:+.5g}", "-0.011", "-0.01", f"{-0.010 / forecast:.5f}"]
    assert lines[3].split() == ["0.1", f"{0.1 * forecast:+.5g}", "-0.0011", "-0.001", "below", "floor"]
    assert lines[4:] == ["Both ways: half of forward less backward, which is free of curvature.", UNTESTED]


def test_no_number_of_the_table_is_cut():
    result = made_result()
    console = Console(file=io.StringIO(), width=80, color_system=None, markup=False, highlight=False)
    print_realised(result, found(), console, verbose=True)
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    forecast = result.split.on_batch
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["1", f"{forecast:+.6g}", "-0.0110001", "-0.01", f"{-0.010 / forecast:.5f}", "-0.001"],
        ["0.1", f"{0.1 * forecast:+.6g}", "-0.00110001", "-0.001", "below floor", "-0.0001"],
    ]


@pytest.mark.parametrize("verbose", [False, True])
def test_that_the_visitation_part_is_not_tested_is_said_where_it_is_not(verbose):
    result = made_result()
    assert UNTESTED in shown(result, found(), verbose=verbose)
    assert UNTESTED not in shown(result, found(total=-0.05), verbose=verbose)
    assert shown(made_result(split=None), found(), verbose=verbose) == []
