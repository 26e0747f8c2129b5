"""Commands on a real pseudo-terminal: colours, bars that go away again, and lines that fit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len
from small_policy import saved_run

SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"))


def on_terminal(arguments: list[str], streams: tuple[str, ...], width: int, **environment: str) -> dict[str, str]:
    """What a command writes to each stream, those named being one terminal of that width and the others pipes."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "entropy_fast", *arguments],
        stdin=subprocess.DEVNULL,
        env={**inherited, "TERM": "xterm-256color", **environment},
        **{name: end if name in streams else subprocess.PIPE for name in ("stdout", "stderr")},
    )
    os.close(end)
    written = b""
    with contextlib.suppress(OSError):  # which is how a terminal ends on Linux
        while piece := os.read(main, 65536):
            written += piece
    piped = {"stdout": process.stdout, "stderr": process.stderr}
    found = {name: stream.read().decode() for name, stream in piped.items() if stream is not None}
    assert process.wait() == 0, (written, found)
    os.close(main)
    return found | {"terminal": written.decode()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_on_a_terminal(folder, tmp_path, width):
    found = on_terminal(["probe", str(folder), "--out", str(tmp_path), "--no-picture"], ("stdout",), width)
    lines = [line.rstrip("\r") for line in SEQUENCE.sub("", found["terminal"]).split("\n")]
    assert COLOUR.search(found["terminal"])
    assert found["stderr"] == ""
    assert max(map(cell_len, lines[:-3])) <= width  # but for names of folders
    assert "├" in found["terminal"]


@pytest.mark.exhaustive
def test_no_colour_on_a_terminal(folder, tmp_path):
    command = ["probe", str(folder), "--out", str(tmp_path), "--no-picture"]
    assert "\x1b" not in on_terminal(command, ("stdout",), 80, NO_COLOR="1")["terminal"]


@pytest.mark.exhaustive
def test_json_is_alone_while_bars_run_on_the_terminal(folder, tmp_path):
    command = ["validate", str(folder), "--out", str(tmp_path), "--no-picture", "--json"]
    found = on_terminal(command, ("stderr",), 80)
    assert found["stdout"] == (tmp_path / "validation.json").read_text()
    # Whatever was shown has been erased: nothing stands on the terminal but what moves its cursor.
    left = SEQUENCE.sub("", found["terminal"].rpartition("\x1b[2K")[2])
    assert left.strip() == ""
