"""Progress: late, one bar at a time, with rate and time left; a line now and then where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from entropy_fast.cli.bars import BETWEEN_LINES, PATIENCE, progress


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _a_capable_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def on(stream: io.StringIO) -> Console:
    return Console(file=stream, force_terminal=True, width=80, color_system=None)


def visible(bars) -> list[str]:
    """What is on the terminal now, line by line."""
    console = Console(file=io.StringIO(), width=80, color_system=None)
    for renderable in bars._bars.get_renderables():
        console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_a_bar_is_late_and_there_is_one():
    clock = Clock()
    with progress("Forecast", console=on(Terminal()), clock=clock) as bars:
        clock.now += PATIENCE - 0.1
        bars.report("entropy", 0, 8)
        assert visible(bars) == []
        clock.now += 0.2
        [line] = visible(bars)
        assert line.startswith("Forecast: entropy ") and "0/8 prompts, 0:00:00" in line
        clock.now += 1
        bars.report("entropy", 2, 8)
        clock.now += 1
        bars.report("entropy", 3, 8)
        [line] = visible(bars)
        assert line.endswith("3/8 prompts, 1 prompts/s, 0:00:05 left")
        bars.report("sampling", 1, 10)
        [line] = visible(bars)
        assert line.startswith("Forecast: sampling ") and "1/10 steps" in line
        bars.report("sampling", 10, 10)
        clock.now += 3725
        [line] = visible(bars)
        assert line.startswith("Forecast ") and line.endswith("1:02:09")  # nothing is counted, so elapsed time
        bars.report("entropy", 4, 8)
        [line] = visible(bars)
        assert "4/8 prompts" in line
        bars.report("entropy", 8, 8)
        assert visible(bars)[0].startswith("Forecast ━")


def test_slow_work_has_a_rate_too():
    clock = Clock()
    with progress("Demo", console=on(Terminal()), clock=clock) as bars:
        for done in range(4):
            bars.report("training", done, 8)
            clock.now += 20
        [line] = visible(bars)
        assert line.endswith("3/8 prompts, 20 s/prompt, 0:01:40 left")


def test_what_is_shown_is_taken_away_again_and_names_are_inert():
    stream, clock = Terminal(), Clock()
    with progress("Loading \x1b]0;evil\x07[red]" + "x" * 200, console=on(stream), clock=clock) as bars:
        clock.now += 60
        bars._bars.refresh()
    written = stream.getvalue()
    [shown] = {part for part in written.split() if part.startswith("\\x1b]0;evil")}
    assert shown.startswith("\\x1b]0;evil\\x07[red]xxx") and shown.endswith("x...") and len(f"Loading {shown}") == 60
    assert "\x1b]0" not in written and "\x07" not in written
    assert written.endswith("\x1b[2K")  # the line is erased at the end


@pytest.mark.parametrize("forced", ["", "1"])
def test_without_a_terminal_there_is_a_line_now_and_then(forced, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", forced)
    clock = Clock()
    with progress("Forecast\x1b[2J", clock=clock) as bars:
        for done in range(8):
            bars.report("entropy", done, 8)
            clock.now += BETWEEN_LINES / 2
        bars.report("sampling", 1, 10)
        bars.say("a sentence\x1b[2J")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "Forecast\\x1b[2J: entropy: 2/8 prompts, 0:00:45 left",
        "Forecast\\x1b[2J: entropy: 4/8 prompts, 0:00:30 left",
        "Forecast\\x1b[2J: entropy: 6/8 prompts, 0:00:15 left",
        "Forecast\\x1b[2J: sampling: 1/10 steps",
    ]
    assert "a sentence\\x1b[2J" in shown.out and "\x1b[2J" not in shown.out


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        ("entropy and direct and update", "entropy and direct and update"),
        ("entropy and direct and reward and length and update and another", "entropy, direct and more"),
    ],
)
def test_a_sweep_of_many_columns_is_named_by_the_first_two(stage, named):
    stream, clock = io.StringIO(), Clock()
    with progress("Demo", console=Console(file=stream, width=80), clock=clock) as bars:
        clock.now += BETWEEN_LINES
        bars.report(stage, 8, 8)
    assert stream.getvalue() == f"Demo: {named}: 8/8 prompts\n"


def test_who_another_speaks_for_says_nothing(capsys):
    clock = Clock()
    with progress("Forecast", shows=False, clock=clock) as bars:
        clock.now += 60
        bars.report("entropy", 1, 8)
    assert capsys.readouterr().err == ""


def test_a_dumb_terminal_gets_no_bar(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    with progress("Forecast", console=on(stream), clock=clock) as bars:
        clock.now += 60
        bars.report("entropy", 1, 8)
    assert stream.getvalue() == "Forecast: entropy: 1/8 prompts\n"
