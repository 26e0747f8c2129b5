"""What the exit status of a command means."""

from __future__ import annotations

import enum

__all__ = ["MEANINGS", "ExitStatus"]


class ExitStatus(enum.IntEnum):
    """Statuses of every command. One that a signal ended has 128 + its number: 130 after Ctrl-C."""

    DONE = 0
    FAULT = 1
    USAGE = 2
    REFUSED = 3
    UNPRINTED = 4


MEANINGS = {
    ExitStatus.DONE: "done, also where the reader of standard output went away before its end",
    ExitStatus.FAULT: "a fault of entropy-fast itself, with a traceback",
    ExitStatus.USAGE: "the command line asks for what there is not: an option, or a value of one",
    ExitStatus.REFUSED: "model, optimizer, rollouts or a file were refused, or a check of doctor failed",
    ExitStatus.UNPRINTED: "done, and everything is written, but standard output could not be",
}
