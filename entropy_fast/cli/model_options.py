"""Options about the model and about files that several commands share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from entropy_fast.errors import ConfigError, RunFolderError
from entropy_fast.run_folder.model_source import ModelSource

__all__ = [
    "CheckpointingOption",
    "DeviceOption",
    "DtypeOption",
    "FourBitOption",
    "ModelOption",
    "given_path",
    "model_source",
]

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Model folder, hub id, FILE.gguf, or package:NAME/FILE.gguf.", show_default=False),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32 (default), bfloat16 or float16.", show_default=False)
]
FourBitOption = Annotated[
    bool | None,
    typer.Option(
        "--load-in-4bit/--no-load-in-4bit", help="Quantise linear layers to NF4 (bitsandbytes).", show_default=False
    ),
]
CheckpointingOption = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing", help="Recompute activations.", show_default=False
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu (default), cuda, cuda:1, ...", show_default=False)
]


def given_path(text: str) -> Path:
    """A path from the command line. An empty one, as an unset variable gives it, would mean the working directory.

    Raises:
        BadParameter: it is empty.
    """
    if not str(text).strip():  # a default is a Path already
        raise typer.BadParameter("the path is empty; pass '.' for the working directory.")
    return Path(text)


def model_source(stored: ModelSource | None, **options: Any) -> ModelSource | None:
    """The run folder's model with the options that were given put over it.

    Args:
        stored: from ``run.json``; None without a run folder.
        options: fields of `ModelSource`; None means not given.

    Returns:
        None when neither names a model.

    Raises:
        ConfigError: an option has a value that there is not, or that this machine lacks.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        if stored is not None:
            return dataclasses.replace(stored, **given)
        return ModelSource(**given) if "name" in given else None
    except RunFolderError as error:
        raise ConfigError(error.problem, fix=error.fix) from error
