"""``entropy-fast report``: what runs left, as one page for a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from entropy_fast.cli.console import output
from entropy_fast.cli.model_options import given_path
from entropy_fast.errors import escaped

__all__ = ["report"]

NAME = "report.html"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=given_path,
            metavar="RUN...",
            help="Folders that probe or demo wrote, folders of a training run with its ledger and kept steps, or ledger files.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help=f"The page; {NAME} in the folder of the (first) run by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs: it needs no network and no program but a browser."""
    from entropy_fast.report.html import write_report
    from entropy_fast.run_folder.run_reading import read_run

    found = [read_run(run) for run in runs]
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    path = write_report(found, out or first / NAME)
    output().print(Text(f"written: {escaped(str(path))} ({path.stat().st_size / 1e6:.2g} MB)"), soft_wrap=True)
