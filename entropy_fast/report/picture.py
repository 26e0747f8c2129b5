"""The picture that goes with a result's files: parts of δH₁ with their intervals, and the prompts that matter most (PNG)."""

from __future__ import annotations

from pathlib import Path

from entropy_fast.atomic import atomic_path
from entropy_fast.errors import EntropyFastError, MissingPackageError, ResultError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.optional_packages import require_package

__all__ = ["require_matplotlib", "write_picture"]


def require_matplotlib(*, quiet: bool = False) -> str | None:
    """Look for matplotlib before the work; None when it is there, and with ``quiet`` a sentence when it is not.

    Raises:
        MissingPackageError: it is not there, and not ``quiet``.
    """
    try:
        require_package("matplotlib", "drawing the picture", otherwise="pass --no-picture")
    except MissingPackageError as error:
        if quiet:
            return f"{error.problem} {error.fix}"
        raise
    return None


def write_picture(result: DeltaH1Result, path: Path) -> Path:
    """Draw the parts of δH₁ and the prompts that matter most.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ResultError: matplotlib cannot draw it.
    """
    require_matplotlib()
    try:
        from entropy_fast.report.plots.overview import contributions

        with atomic_path(path) as temporary:
            contributions(result).savefig(temporary, format="png")
    except EntropyFastError:
        raise
    except Exception as error:  # fonts, caches, backends: the result is there all the same
        raise ResultError(
            f"{path.name} cannot be drawn: {type(error).__name__}: {error}",
            fix="repair matplotlib, or pass --no-picture.",
        ) from error
    return path
