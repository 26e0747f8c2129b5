"""Commands, and what happens to errors: a message for the reader instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer
from rich.text import Text

from entropy_fast.cli import demo_command, doctor_command, probe_command, sample_command
from entropy_fast.cli.console import errors, output
from entropy_fast.errors import EntropyFastError

__all__ = ["application", "run"]

application = typer.Typer(
    help="Forecast how much the next RL update will change a language model's policy entropy, and why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
application.command("demo")(demo_command.demo)
application.command("probe")(probe_command.probe)
application.command("sample")(sample_command.sample)
application.command("doctor")(doctor_command.doctor)


@application.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Options before the command."""
    if version:
        from entropy_fast import __version__

        output().print(__version__)
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes ``sys.argv``.

    Returns:
        Exit status: 0 done, 1 a check of ``doctor`` failed, 2 bad input or an error of this package.
        With ``ENTROPY_FAST_TRACEBACK=1`` errors of this package keep their traceback.
    """
    try:
        application(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="entropy-fast")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except EntropyFastError as error:
        if os.environ.get("ENTROPY_FAST_TRACEBACK") == "1":
            raise
        errors().print(Text(f"error: {error.problem}", style="bold red"))
        errors().print(Text(f"what to do: {error.fix}"))
        return 2
    except OSError as error:
        if os.environ.get("ENTROPY_FAST_TRACEBACK") == "1":
            raise
        errors().print(Text(f"error: {error}", style="bold red"))
        errors().print(Text("what to do: check that the path exists and can be read or written."))
        return 2
    return 0
