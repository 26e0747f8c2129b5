"""A report as one HTML file that needs nothing else: rendered from templates, under a policy that lets nothing run or load."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from entropy_fast.atomic import atomic_path
from entropy_fast.report.html.model import page_of
from entropy_fast.run_folder.run_reading import SavedRun

__all__ = ["report_html", "write_report"]

TEMPLATES = "templates"


def report_html(runs: Sequence[SavedRun]) -> str:
    """The page of one run or several.

    Every text goes through the templates' escaping. The page's own style sheet is the one thing that its content security
    policy lets act: no script runs, nothing is loaded, nothing is sent.

    Args:
        runs: at least one.
    """
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    environment = Environment(
        loader=PackageLoader("entropy_fast.report.html", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(page=page_of(runs), policy=policy, style=Markup(style))  # our own file


def write_report(runs: Sequence[SavedRun], path: Path) -> Path:
    """Write the page.

    Args:
        runs: at least one.
        path: of the file; its folder is there.

    Returns:
        The path.

    Raises:
        OutputFileError, FileNotFoundError: it cannot be written.
    """
    text = report_html(runs)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _style() -> str:
    found = resources.files("entropy_fast.report.html").joinpath(TEMPLATES).joinpath("style.css")
    return found.read_text(encoding="utf-8")
