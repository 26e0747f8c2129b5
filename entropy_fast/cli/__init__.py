"""The console script ``entropy-fast``."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point: run the command line and exit."""
    from entropy_fast.cli.app import run

    raise SystemExit(run())
