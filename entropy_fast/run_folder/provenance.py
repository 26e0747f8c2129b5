"""How a result came to be: what was typed, of which model and files, with which versions, on what machine."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from entropy_fast._version import __version__
from entropy_fast.run_folder.model_source import ModelSource

__all__ = ["Provenance", "provenance_of"]

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "pyarrow")  # whose versions move a forecast


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Plain texts throughout.

    Attributes:
        commands: command lines that give the result again, in the order in which they are to be typed.
        directory: the working directory that paths are relative to.
        model: as `ModelSource` names it.
        dtype: of its weights.
        device: where it was.
        files: paths of what was read, by what it is.
        versions: of Python, this package and the libraries that do the arithmetic.
        machine: operating system and processor.
        finished: when the result was written, ISO 8601 in UTC.
        optimizer: its kind; empty where it was not said.
    """

    commands: tuple[str, ...]
    directory: str
    model: str
    dtype: str
    device: str
    files: Mapping[str, str]
    versions: Mapping[str, str]
    machine: str
    finished: str
    optimizer: str = ""


def provenance_of(
    commands: Sequence[Sequence[str]], model: ModelSource, files: Mapping[str, Path | None], optimizer: str = ""
) -> Provenance:
    """Of a result that is about to be written.

    Args:
        commands: each as its words, unquoted.
        model: the policy's base, or the policy.
        files: what was read; None for what was not there.
        optimizer: its kind; empty where it is not known.
    """
    return Provenance(
        commands=tuple(map(shlex.join, commands)),
        directory=os.getcwd(),
        model=model.name,
        dtype=f"{model.dtype}, linear layers in 4 bits" if model.load_in_4bit else model.dtype,
        device=model.device,
        files={name: str(path) for name, path in files.items() if path is not None},
        versions={"python": platform.python_version(), "entropy-fast": __version__, **_installed()},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        optimizer=optimizer,
    )


def _installed() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
