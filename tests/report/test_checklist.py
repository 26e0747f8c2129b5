"""The doctor's checklist: the verdict first, what failed whole, and nothing that a model's text could do."""

from __future__ import annotations

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console

from entropy_fast.report.checklist import checklist_document, print_checklist
from entropy_fast.report.doctor import Check, verdict

CHECKS = [
    Check("python", None, "3.11"),
    Check("torch", None, "2.9"),
    Check("grad context", True, "fine"),
    Check("long", True, "word " * 60 + "end"),
    Check("broken", False, "word " * 60 + "what to do\x1b[2J"),
]


def shown(width: int, *, verbose: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False)
    print_checklist(CHECKS, verdict(CHECKS), console, verbose=verbose)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_failed_is_whole_and_the_rest_is_short(width):
    lines = shown(width)
    assert " ".join(lines).startswith(verdict(CHECKS).detail)
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("FAIL broken: ")]
    said = " ".join(" ".join(lines).split())
    assert "what to do" in said and said.count("end") == 0
    assert "info versions: python 3.11, torch 2.9" in said


def test_everything_is_whole_where_it_is_asked_for():
    said = " ".join(" ".join(shown(80, verbose=True)).split())
    assert "end" in said and "info python: 3.11" in said


def test_as_json():
    document = json.loads(checklist_document(CHECKS, verdict(CHECKS)))
    assert [check["passed"] for check in document["checks"]] == [None, None, True, True, False]
    assert document["verdict"]["passed"] is False
