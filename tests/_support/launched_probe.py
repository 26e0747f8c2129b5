"""``entropy-fast probe`` as a launcher starts it, with one rank killed where it enters a phase.

Usage: torchrun ... launched_probe.py RANK PHASE ARGUMENT... (rank -1 for none)
"""

from __future__ import annotations

import os
import signal
import sys

from ranks_at_work import at_phase

from entropy_fast.cli.app import run


def main(failing: int, phase: str, *arguments: str) -> int:
    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with at_phase(phase if int(os.environ["RANK"]) == failing else "none", end):
        return run(arguments)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
