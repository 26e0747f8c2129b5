"""What dumps of texts have in common: rows of a file, one step, token ids made with a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from entropy_fast.errors import RolloutsError, RolloutsFileError
from entropy_fast.integrations.readers.fields import Fields
from entropy_fast.integrations.readers.options import ReaderOptions, lacking
from entropy_fast.integrations.readers.sequences import SampledSequence, join_prompt_and_response
from entropy_fast.rollouts.fields import open_regular
from entropy_fast.rollouts.jsonl import JsonLineError, json_lines
from entropy_fast.rollouts.tokenizing import prompt_token_ids, token_ids

__all__ = ["rows_of", "single_step", "tokenized"]


def rows_of(reader: str, batch: Any) -> list[Any]:
    """The rows of a ``.jsonl`` or ``.parquet`` file, of a data frame, or of a list of rows.

    Raises:
        RolloutsError: it is none of these, or the file cannot be read.
    """
    if isinstance(batch, (str, os.PathLike)):
        return _rows_of_file(reader, Path(batch))
    if hasattr(batch, "to_dict") and hasattr(batch, "columns"):
        return list(batch.to_dict("records"))
    if isinstance(batch, Mapping) or not isinstance(batch, Iterable):
        found = "one mapping" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise RolloutsError(f"{reader}: the batch is {found}; expected rows.", fix="pass a list of rows, or a path.")
    return list(batch)


def single_step(reader: str, rows: Sequence[Fields]) -> None:
    """Raise where there are no rows, or rows of several training steps: their policies differ."""
    if not rows:
        raise RolloutsError(f"{reader}: there are no rows.", fix="pass a file or a list with at least one.")
    steps = sorted({str(row.get("step")) for row in rows})
    if len(steps) > 1:
        shown = ", ".join(steps[:5]) + (", ..." if len(steps) > 5 else "")
        raise RolloutsError(
            f"{reader}: the rows are of {len(steps)} steps ({shown}).", fix="pass the rows of one step as a list."
        )


def tokenized(
    reader: str, options: ReaderOptions, prompts: Sequence[str], responses: Sequence[str]
) -> list[SampledSequence]:
    """Sequences of texts, in the tokens that the caller's tokenizer makes of them.

    Raises:
        RolloutsError: there is no tokenizer.
    """
    if options.tokenizer is None:
        raise lacking(reader, "token ids", "texts alone", "tokenizer")
    made = zip(prompt_token_ids(options.tokenizer, prompts), token_ids(options.tokenizer, responses), strict=True)
    return [
        join_prompt_and_response(torch.tensor([*prompt, *response]), torch.ones(len(response)), {})
        for prompt, response in made
    ]


def _rows_of_file(reader: str, path: Path) -> list[Any]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise RolloutsError(f"{reader}: {path} is neither .jsonl nor .parquet.", fix="pass a file the trainer wrote.")
    try:
        if path.suffix == ".jsonl":
            return [row for _, row in json_lines(path)]
        import pyarrow.parquet

        with open_regular(path) as file:
            return list(pyarrow.parquet.ParquetFile(file).read().to_pylist())
    except JsonLineError as error:
        raise RolloutsError(f"{reader}: {path}, line {error.line}: {error}", fix=error.fix) from error
    except (OSError, ValueError, RolloutsFileError) as error:
        raise RolloutsError(
            f"{reader}: {path} cannot be read ({error}).", fix="pass a complete file the trainer wrote."
        ) from error
