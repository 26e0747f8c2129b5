"""Every code block of the documentation runs as it stands, from the top of its page to the bottom."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import re
import runpy
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import doc_names
import own_benchmarks
import pytest
from doc_blocks import ROOT, Block, blocks_of, pages

from entropy_fast.cli.app import run as command_line

LANGUAGES = {"python", "bash", "json", ""}
PAGES = [page for page in pages() if any(block.language in ("python", "bash") for block in blocks_of(page))]
# Commands that end a shell's set-up, or take minutes: that what they name is there is what is tried.
PROGRAMS = ("pip", "make", "source", "git")
LAUNCHER = r"(?:\S+=\S+ )*(?:(?:torchrun|accelerate launch) (?:--\S+ \S+ )*|python )"
MODULE = re.compile(LAUNCHER + r"-m (?P<module>[\w.]+)(?P<rest>.*)")


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Execute a block among ``names``; what goes wrong is told with the line of the page."""
    # Lines above the block make the numbers in a traceback those of the page.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    try:
        exec(code, names)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(block.page)), block.line)
        pytest.fail(f"{block.page.relative_to(ROOT)}:{line}: {type(error).__name__}: {error}")


def commands_of(block: Block) -> list[str]:
    """The commands of a block, without comments; lines that end in a backslash go on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*$", "", line).strip())]


@functools.cache
def help_of(module: str) -> str:
    """What ``python -m MODULE --help`` prints, found without the seconds that another process takes to import torch."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        own_benchmarks.make_importable(patch)
        patch.setattr(sys, "argv", [module, "--help"])
        with contextlib.suppress(SystemExit):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert "usage:" in said.getvalue(), f"{module} --help says {said.getvalue()!r}"
    return said.getvalue()


def run_command(command: str, where: str) -> None:
    """Run a command of ours; of others, look for what they name.

    ``entropy-fast`` runs here and has to succeed. Of ``python -m MODULE`` the module has to be there and its help to name every
    flag; of ``make TARGET``, the target.
    """
    words = [path for word in shlex.split(command) for path in (sorted(glob.glob(word)) or [word])]
    if words[0] == "entropy-fast":
        if words[1] != "demo":
            status = command_line(words[1:])
            assert status == 0, f"{where}: {command} ended with {status}"
    elif module := MODULE.match(command):
        name = module["module"]
        if name == "entropy_fast":
            return
        flags = [word.split("=")[0] for word in shlex.split(module["rest"]) if word.startswith("--")]
        missing = [flag for flag in flags if flag not in help_of(name)]
        assert not missing, f"{where}: {command}: no {missing}"
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        missing = [target for target in targets if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)]
        assert not missing, f"{where}: no target {missing}"
    else:
        assert words[0] in PROGRAMS, f"{where}: nobody runs {words[0]}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = doc_names.given(tmp_path)
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block, names)
        elif block.language == "bash":
            for command in commands_of(block):
                run_command(command, f"{page.name}:{block.line}")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_languages_are_known(page: Path) -> None:
    """A block of another language would be run by nobody."""
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


def test_what_is_wrong_is_told_with_its_line(tmp_path: Path) -> None:
    block = Block(ROOT / "README.md", 7, "python", "a = 1\nb = a / 0")
    with pytest.raises(pytest.fail.Exception, match=r"README.md:8: ZeroDivisionError"):
        run_python(block, {})
    with pytest.raises(AssertionError, match="no target"):
        run_command("make coffee", "README.md:1")
    with pytest.raises(AssertionError, match="ended with 3"):
        run_command(f"entropy-fast probe {tmp_path}/nothing", "README.md:1")
    with pytest.raises(AssertionError, match="--sugar"):
        run_command("python -m benchmarks.coverage --sugar 3", "README.md:1")
