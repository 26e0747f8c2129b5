"""How much of a result a command shows, and in which form."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import Annotated, TextIO

import typer
from rich.console import Console

from entropy_fast.cli.console import errors, output
from entropy_fast.errors import ConfigError

__all__ = ["JsonOption", "Showing", "VerboseOption"]

VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Everything that there is to show, not the first screen alone.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="The result as JSON, and nothing else, on standard output.", show_default=False)
]


@dataclasses.dataclass(frozen=True)
class Showing:
    """What goes to standard output.

    Attributes:
        verbose: everything, not only the first screen.
        as_json: one JSON document and nothing else.
        stream: standard output.
    """

    verbose: bool
    as_json: bool
    stream: TextIO

    @classmethod
    def of(cls, context: typer.Context, *, verbose: bool, as_json: bool) -> Showing:
        """As the command line has it. For JSON, whatever else prints does so on standard error until the command ends.

        Raises:
            ConfigError: both are asked for.
        """
        if verbose and as_json:
            raise ConfigError("--verbose and --json are both given.", fix="leave one out: JSON has everything in it.")
        stream = sys.stdout
        if as_json:
            context.with_resource(contextlib.redirect_stdout(sys.stderr))
        return cls(verbose, as_json, stream)

    @property
    def aside(self) -> Console:
        """Where notes go that are no part of the result."""
        return errors() if self.as_json else output()

    def document(self, text: str) -> None:
        """Print the JSON."""
        print(text.rstrip("\n"), file=self.stream)
