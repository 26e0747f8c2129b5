"""Where a result came from, for whoever reads its files: the command line, the optimizer, the texts of its tokens."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder.model_source import ModelSource, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from entropy_fast.step.reading import OptimizerAtHand

__all__ = ["command_line", "found_tokenizer", "optimizer_kind", "program"]

PROGRAM = "entropy-fast"
TYPED = (
    "COMMANDLINE"  # of where a value may be from; the enumeration itself is click's or, in later versions, typer's own
)
TOKENIZER = "tokenizer_config.json"  # what save_pretrained of a tokenizer leaves


def command_line(context: typer.Context) -> list[str]:
    """The words that were typed, made again from what they were taken for; without options that were not typed."""
    arguments: list[str] = []
    options: list[str] = []
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        source = context.get_parameter_source(name)
        if value is None or source is None or source.name != TYPED:
            continue
        if parameter.param_type_name == "option":
            options += _option(parameter, value)
        else:
            arguments += _texts(value)
    return [PROGRAM, str(context.info_name), *arguments, *options]


def program() -> list[str]:
    """The words that start this very installation from a shell as it is now: short where they may be.

    An environment that is not activated has its script beside the interpreter and not on the PATH, where another
    installation's may be.
    """
    own, found = Path(sys.executable).with_name(PROGRAM), shutil.which(PROGRAM)
    if not own.is_file():
        return [sys.executable, "-m", "entropy_fast"]
    if found is not None and own.samefile(found):
        return [PROGRAM]
    here = Path.cwd()
    return [str(own.relative_to(here) if own.is_relative_to(here) else own)]


def optimizer_kind(at_hand: OptimizerAtHand) -> str:
    """What is known of an optimizer's kind: of a file with Adam's moments not which of the two wrote it."""
    return "Adam or AdamW" if at_hand.live is None else type(at_hand.live).__name__


def found_tokenizer(source: ModelSource, folders: Sequence[Path | None]) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The policy's tokenizer, and why there is none where there is none.

    Args:
        source: the model, whose tokenizer stands beside it.
        folders: looked at before: an adapter's, where a tokenizer may have been saved too.
    """
    for folder in folders:
        if folder is not None and (folder / TOKENIZER).is_file():
            source = ModelSource(str(folder))
            break
    try:
        return load_tokenizer(source), ""
    except RunFolderError as error:
        return None, error.problem


def _option(option: Any, value: Any) -> list[str]:
    if option.is_flag:
        return [option.opts[0] if value else option.secondary_opts[0]]
    return [word for text in _texts(value) for word in (option.opts[0], text)]


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
