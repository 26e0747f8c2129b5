"""Packages that are asked for by what a user calls, and not installed with this one."""

from __future__ import annotations

import importlib.util

from entropy_fast.errors import MissingPackageError

__all__ = ["require_package"]


def require_package(name: str, purpose: str, *, otherwise: str = "") -> None:
    """Look for a package without importing it.

    Args:
        name: of the package, the same to import and to install.
        purpose: what needs it, such as "drawing".
        otherwise: another way to go on, in the imperative; empty where there is none.

    Raises:
        MissingPackageError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingPackageError(
            f"{purpose}: {name} is not installed.", fix=f"pip install {name}{', or ' + otherwise if otherwise else ''}."
        )
