"""Commands, and what happens to errors and signals: a message for the reader instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import typer
from rich.text import Text

from entropy_fast.cli import (
    demo_command,
    doctor_command,
    probe_command,
    report_command,
    sample_command,
    validate_command,
)
from entropy_fast.cli.console import errors, lenient_streams, output
from entropy_fast.cli.exit_status import MEANINGS, ExitStatus
from entropy_fast.cli.launched import speaks
from entropy_fast.errors import ConfigError, EntropyFastError, escaped
from entropy_fast.run_folder.interrupts import ENDING

__all__ = ["application", "run"]

application = typer.Typer(
    help="Forecast how much the next RL update will change a language model's policy entropy, and why.",
    epilog="Exit status: "
    + "; ".join(f"{status.value} {meaning}" for status, meaning in MEANINGS.items())
    + "; 128 + n ended by signal n (130 by Ctrl-C).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
application.command("demo")(demo_command.demo)
application.command("probe")(probe_command.probe)
application.command("report")(report_command.report)
application.command("sample")(sample_command.sample)
application.command("doctor")(doctor_command.doctor)
application.command("validate")(validate_command.validate)


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
        An `ExitStatus`, or 128 + n where signal n ended it. With ``ENTROPY_FAST_TRACEBACK=1`` errors of this package show
        their traceback too.
    """
    with lenient_streams() as failure, _ending_signals() as received:
        try:
            status = _status(list(sys.argv[1:] if arguments is None else arguments))
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        if received:
            status = 128 + received[0]
        sys.stdout.flush()
        if isinstance(lost := failure(), OSError) and not isinstance(lost, BrokenPipeError):
            errors().print(Text(f"error: standard output cannot be written: {lost.strerror}", style="bold red"))
            status = status or ExitStatus.UNPRINTED
    return status


def _status(arguments: list[str]) -> int:
    try:
        application(args=arguments, prog_name="entropy-fast")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else ExitStatus.DONE
    except EntropyFastError as error:
        if os.environ.get("ENTROPY_FAST_TRACEBACK") == "1":
            _show_traceback()
        if speaks(error):
            _say(error.problem, error.fix)
        return ExitStatus.USAGE if isinstance(error, ConfigError) else ExitStatus.REFUSED
    except OSError as error:
        if os.environ.get("ENTROPY_FAST_TRACEBACK") == "1":
            _show_traceback()
        if speaks():
            _say(str(error), "check that the path exists and can be read or written.")
        return ExitStatus.REFUSED
    except Exception as error:  # whatever it is, it is no fault of the reader's, and is to be told from what is
        _show_traceback()
        _say(
            f"unexpected {type(error).__name__}: {error}",
            "this is a fault of entropy-fast, not of your data: report it with the lines above.",
        )
        return ExitStatus.FAULT
    return ExitStatus.DONE


def _say(problem: str, fix: str) -> None:
    errors().print(Text(f"error: {escaped(problem)}", style="bold red"))
    errors().print(Text(f"what to do: {escaped(fix)}"))


def _show_traceback() -> None:
    for line in traceback.format_exc().splitlines():
        errors().print(Text(escaped(line)), soft_wrap=True)


@contextlib.contextmanager
def _ending_signals() -> Iterator[list[int]]:
    """All signals that end a process do so as Ctrl-C does, by an exception, so that what is under way is cleaned up.

    Yields the numbers of those that came.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # What was ignored stays so: `nohup` ignores SIGHUP.
    before = {n: h for n in ENDING if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, end)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
