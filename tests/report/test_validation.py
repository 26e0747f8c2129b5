"""A validation on one screen: a sentence, and a line a multiple, whose numbers are those that were found."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from entropy_fast.report.validation import print_validation, summary
from entropy_fast.truth import RealisedChange, Validation
from entropy_fast.truth.measuring import Symmetric

NAN = math.nan


def point(eta: float, *, total: float = NAN, below_floor: bool = False) -> RealisedChange:
    direct = -0.0123456 * eta
    return RealisedChange(
        eta, 1.1 * direct, total, 0.1, direct, Symmetric(direct, total, 0.1), -1e-4, 0.9, 0.2, False, below_floor
    )


def validation(points: tuple[RealisedChange, ...], **changed: float) -> Validation:
    plain = Validation(
        forecast=(-0.0125, -0.05, 0.02),
        points=points,
        unit="nats per token",
        level=0.5,
        floor=1e-6,
        learning_rate=1e-4,
        geometry="next_step",
        slope=0.98765,
        r_squared=0.999,
        smallest_ratio=1.0,
        own_ratio=0.99,
        total_slope=NAN,
        total_slope_error=NAN,
        ten_percent_off=3.21e-4,
    )
    return dataclasses.replace(plain, **changed)


def shown(found: Validation, width: int, name: str = "runs/a", *, verbose: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False)
    print_validation(name, found, console, verbose=verbose)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_and_its_numbers_are_those_found(width):
    points = (point(0.01, below_floor=True), point(0.1, total=-0.004), point(1.0, total=-0.045))
    found = validation((point(1.0, total=-0.045), *points[:2]), total_slope=0.9, total_slope_error=0.4)
    lines = shown(found, width, "evil\x1b[2J" + "x" * 300)
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    said = " ".join(" ".join(lines[1:]).split())
    assert said.startswith(
        "Both ways the change is 0.9877 of the direct forecast on average up to the run's own step, and of the total forecast "
        "0.9, standard error 0.4; the first order is 10 % off at learning rate 0.000321, the run's own being 0.0001."
    )
    assert lines[-1].startswith("Both ways: half of forward less backward")
    rows = [line.split() for line in lines[-4:-1]]
    assert rows[0] == ["1", "-0.0125", "-0.01235", "0.9876", "-0.05", "-0.045", "±", "0.1"]
    assert rows[1] == ["0.01", "-0.000125", "-0.0001235", "below", "floor", "-0.0005", "unknown"]
    assert rows[2] == ["0.1", "-0.00125", "-0.001235", "0.9876", "-0.005", "-0.004", "±", "0.1"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"slope": NAN}, "Every change is below what rounding leaves (1e-06)"),
        (
            {"ten_percent_off": math.inf},
            "the first order is nowhere 10 % off up to learning rate 0.0001, the run's own being 0.0001",
        ),
        ({"ten_percent_off": NAN}, "more than 10 % off from learning rate 0.0001, the smallest tried, on"),
    ],
)
def test_what_cannot_be_said_is_not(changed, said):
    lines = shown(validation((point(1.0),), **changed), 80)
    assert said in " ".join(" ".join(lines).split())
    assert "nan" not in " ".join(lines) and "total forecast" not in " ".join(lines)
    assert lines[-1] == "This tests the direct part alone; the total takes other responses: --held-out."


def test_everything_is_in_tables_where_it_is_asked_for():
    said = " ".join(shown(validation((point(1.0, total=-0.045),)), 120, verbose=True))
    assert "step taken" in said and "both ways" in said and "Pareto k" in said


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ((point(1.0), point(0.1)), False),
        ((point(1.0), point(0.1), point(0.01, below_floor=True)), False),
        ((point(1.0), point(0.1), point(3.0)), False),
        ((point(1.0), point(0.1), point(0.01)), True),
    ],
)
def test_a_line_takes_three_points(points, line):
    """Above the floor and up to the step itself, as those that a slope is of."""
    said = summary(validation(points))
    assert said.startswith(
        "Direct: the step taken changed the entropy by -0.01358, which is 1.0864 of the forecast, and 0.9900 of it with the "
        "second order (the curvature) added."
    )
    assert ("Slope 0.98765" in said) is ("R² 0.9990" in said) is line
    assert ("10 % off at learning rate 0.000321 (the run's own is 0.0001)") in said
