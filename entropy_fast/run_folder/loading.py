"""What loading weights reported: a weight that is in no file would be a random number, so it is an error that names it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from entropy_fast.errors import RunFolderError

__all__ = ["first_line", "ordinary_files", "refuse_larger_than_files", "require_every_weight"]

NAMES_SHOWN = 3
# Weights that a byte of a file holds at the very most: 2-bit ones are four. A model that has more is not in the file, and what
# is not in the file is made up, in memory that there may not be.
WEIGHTS_PER_BYTE = 8
WEIGHT_FILES = ("*.safetensors", "*.bin")
# Nothing is asked of models below this size: they fit into any memory, and loading them says best what is wrong.
SMALL_MODEL, FEW_LAYERS = 2**28, 2**10


def require_every_weight(
    what: str, *, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str] = (), fix: str
) -> None:
    """Raise unless the file and the model have the same weights.

    Args:
        what: the model or adapter, for the message.
        missing: names that the model has and the file lacks; weights tied to others do not belong here.
        unexpected: names that the file has and the model lacks.
        mismatched: names with another shape in the file.
        fix: what to do about it.

    Raises:
        RunFolderError: they differ; the message names the first of each kind.
    """
    found = [
        f"{description} {_named(sorted(names))}"
        for description, names in (
            ("lacks", set(missing)),
            ("has, unknown to the model,", set(unexpected)),
            ("has in another shape", set(mismatched)),
        )
        if names
    ]
    if found:
        raise RunFolderError(
            f"{what}: the weights file {'; it '.join(found)}. What is not in the file would be random numbers.", fix=fix
        )


def refuse_larger_than_files(folder: Path, what: str) -> None:
    """Raise when a model's configuration asks for many more weights than its files can hold.

    The model is built without memory for that. A folder without weights, or without a configuration, is left to who loads it.

    Raises:
        RunFolderError: it does, or has more layers than the files have bytes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    bytes_there = sum(path.stat().st_size for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    if not bytes_there or not (folder / "config.json").is_file():
        return
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    # A layer takes time to build even without memory.
    fits = not isinstance(layers, int) or layers <= max(FEW_LAYERS, bytes_there // 16)
    if fits:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        weights = sum(parameter.numel() for parameter in model.parameters())
        fits = weights <= max(SMALL_MODEL, WEIGHTS_PER_BYTE * bytes_there)
    if not fits:
        raise RunFolderError(
            f"{what}: config.json speaks of {layers} layers and a model of far more weights than its files, of "
            f"{bytes_there} bytes, can hold.",
            fix="put the config.json beside the weights that it was saved with.",
        )


def ordinary_files(folder: Path, what: str) -> None:
    """Raise when the folder holds a pipe, socket or device, on which reading would wait for ever.

    Raises:
        RunFolderError: it does.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise RunFolderError(
                f"{what} {folder}: {path.name} is not a file.", fix="remove it, or pass another folder."
            )


def first_line(error: BaseException) -> str:
    """What an error of a library says in its first line, with its type where that alone would be unclear."""
    text = str(error).strip()
    line = text.splitlines()[0][:300] if text else ""
    if isinstance(error, (OSError, ValueError, ImportError)) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _named(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(f"'{name}'" for name in names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
