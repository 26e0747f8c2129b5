"""The doctor's checklist on the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from entropy_fast._version import __version__
from entropy_fast.report.doctor import PACKAGES, Check
from entropy_fast.report.glyphs import glyphs_of
from entropy_fast.report.layout import wrapped

__all__ = ["CHECKLIST_SCHEMA", "checklist_document", "print_checklist"]

CHECKLIST_SCHEMA = "entropy_fast.doctor/1"
MARKS = {True: "ok", False: "FAIL", None: "info"}
STYLES = {True: "green", False: "bold red", None: ""}
MOST, FEW = 60, 2  # lines of a check that is shown whole, and of others
NARROWEST = 20  # cells that a line has at least
VERSIONS = "versions"  # of what, in one check


def print_checklist(checks: Sequence[Check], verdict: Check, console: Console, *, verbose: bool = False) -> None:
    """The verdict first, then at most two lines a check, but for versions and what failed, which are shown whole.

    Args:
        checks: all of them.
        verdict: what they come to.
        console: where to.
        verbose: every check is shown whole.
    """
    glyphs = glyphs_of(console)
    console.print(wrapped(verdict.detail, console, lines=MOST, cut=glyphs.cut), style="bold")
    shown = list(checks) if verbose else _versions_in_one(checks)
    taken = max(map(len, MARKS.values())) + 1
    for check in shown:
        whole = verbose or check.passed is False or check.name == VERSIONS
        width = max(console.width - taken, NARROWEST)
        said = wrapped(
            f"{check.name}: {check.detail}", console, lines=MOST if whole else FEW, cut=glyphs.cut, width=width
        )
        mark = Text(f"{MARKS[check.passed]:<{taken}}", style=STYLES[check.passed])
        for number, line in enumerate(said.split("\n")):
            console.print((mark if number == 0 else Text(" " * taken)) + line)


def _versions_in_one(checks: Sequence[Check]) -> list[Check]:
    versions = [check for check in checks if check.name in ("python", *PACKAGES)]
    listed = ", ".join(f"{check.name} {check.detail}" for check in versions)
    one = [Check(VERSIONS, None, listed)] if versions else []
    return one + [check for check in checks if check not in versions]


def checklist_document(checks: Sequence[Check], verdict: Check) -> str:
    """All of it as JSON: ``checks`` and ``verdict``, whose ``passed`` is null for what is neither."""
    document = {
        "schema": CHECKLIST_SCHEMA,
        "version": __version__,
        "checks": [dataclasses.asdict(check) for check in checks],
        "verdict": dataclasses.asdict(verdict),
    }
    return json.dumps(document, indent=2, allow_nan=False)
