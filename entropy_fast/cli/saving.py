"""Writing a result and then showing it: what is printed may get lost, what is on disk may not."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from entropy_fast.cli.showing import Showing
from entropy_fast.errors import EntropyFastError, ResultError, escaped
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.layout import files_line
from entropy_fast.report.picture import require_matplotlib, write_picture
from entropy_fast.report.terminal import print_result
from entropy_fast.run_folder.provenance import Provenance
from entropy_fast.run_folder.result_files import result_document, write_result

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Beside", "save_and_show", "show_online"]

FAR = 1e-4  # of the number; the same arithmetic on the same machine is within 1e-6, in 16 bits with other padding it is not


@dataclasses.dataclass(frozen=True)
class Beside:
    """What is written beside a result.

    Attributes:
        provenance: how it came to be.
        responses: of `entropy_fast.run_folder.response_table.response_table`.
        without_texts: why its tokens have no texts; empty where they have.
        picture: whether to draw ``contributions.png``; None draws it where matplotlib can, and says where not.
    """

    provenance: Provenance
    responses: pa.Table
    without_texts: str = ""
    picture: bool | None = None


def save_and_show(result: DeltaH1Result, folder: Path, beside: Beside, showing: Showing) -> None:
    """Write all files of a result, then show it and where they are. One that cannot be written is shown all the same.

    Args:
        result: what to write and show.
        folder: where to.
        beside: what else to write.
        showing: how much to show, and in which form.

    Raises:
        ResultError: a number of it is not finite.
        RunFolderError, OutputFileError: the folder or a file cannot be written.
    """
    console = showing.aside
    try:
        paths, undrawn = _write(result, folder, beside)
    except ResultError:
        raise
    except EntropyFastError:
        if showing.as_json:
            showing.document(json.dumps(result_document(result), indent=2, allow_nan=False))
        else:
            print_result(result, console, verbose=showing.verbose)
        raise
    if showing.as_json:
        showing.document(paths[0].read_text(encoding="utf-8"))
    else:
        print_result(result, console, verbose=showing.verbose)
    if undrawn is not None:
        console.print(Text(f"note: contributions.png was not drawn: {escaped(undrawn)}", style="yellow"))
    if beside.without_texts:
        console.print(Text(f"note: tokens are written without their texts: {beside.without_texts}", style="yellow"))
    if not showing.as_json:
        console.print(files_line(paths, console.width), soft_wrap=True)


def show_online(online: Mapping[str, Any] | None, result: DeltaH1Result, console: Console) -> None:
    """Say how far a repeated forecast is from the one that was made online: a base that has changed shows nowhere else.

    Args:
        online: of a kept step; None where no number was kept.
        result: the repeated one.
        console: where to say it.
    """
    kept = None if online is None else online.get("forecast")
    if kept is None:
        return
    apart = abs(result.forecast.value - kept) / abs(kept) if kept else abs(result.forecast.value)
    text = f"online: {kept:.6g} {result.unit}; this one is {apart:.1e} of it away."
    if apart <= FAR:
        console.print(Text(text))
    else:
        fix = "Was it on another device, or has the base model changed since?"
        console.print(Text(f"note: {text} {fix}", style="yellow"))


def _write(result: DeltaH1Result, folder: Path, beside: Beside) -> tuple[list[Path], str | None]:
    """The paths that were written, and why there is no picture, where one was wanted."""
    write = functools.partial(write_result, result, folder, provenance=beside.provenance, responses=beside.responses)
    undrawn = require_matplotlib(quiet=beside.picture is None) if beside.picture is not False else None
    draws = beside.picture is not False and undrawn is None
    try:
        return write(draw=write_picture if draws else None), undrawn
    except ResultError as error:
        if not draws:
            raise
        return write(), error.problem  # if it was not the picture, this raises again
