"""Rollouts files: JSON Lines (`.jsonl`) and Parquet (`.parquet`), one row per response.

Keys of a row (columns in Parquet). Every row of a file has the same keys; no value is null.

========================  ==============================================================================================
``group_id``              integer, kept; or string, mapped to 0, 1, ... in order of appearance
tokens, in one form of    ``input_ids`` + ``loss_mask``: unpadded lists of one length, 1 (or true) at response tokens
                          ``prompt_token_ids`` + ``response_token_ids``: unpadded lists
                          ``prompt`` + ``response``: texts, which need a tokenizer
``advantage``, ``reward`` numbers; one of them or both. Without ``advantage`` it is the reward minus its group's mean
``max_length``            optional integer, the generation budget in tokens; one per group
``old_logprobs``          optional list, the sampler's log-prob (nats) of every response token
``ref_logprobs``          optional list, a reference policy's
``token_weights``         optional list, what the update's coefficient of every response token is multiplied by
``temperature``,          optional numbers, how responses were sampled; one per file. ``top_k`` is an integer, 0 or -1 where it
``top_p``, ``top_k``,     was off
``min_p``
``prompt``, ``response``  beside token ids: optional texts, kept for reports
========================  ==============================================================================================
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_fast.atomic import atomic_path
from entropy_fast.errors import RolloutsFileError
from entropy_fast.rollouts.container import Rollouts
from entropy_fast.rollouts.fields import RowSource
from entropy_fast.rollouts.formats import format_of
from entropy_fast.rollouts.rows import rollouts_from_rows, table_from_rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_rollouts", "write_rollouts"]


def read_rollouts(path: str | os.PathLike[str], *, tokenizer: PreTrainedTokenizerBase | None = None) -> Rollouts:
    """Read a rollouts file; the keys of a row are listed at the top of this module.

    Rows become a rectangle [N, T] padded on the right with id 0 under attention mask 0. Advantages and rewards are
    float64 (both formats hold doubles, so nothing is rounded), on the CPU. Blank lines of a JSON Lines file are skipped
    but counted in line numbers.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        tokenizer: needed when tokens are given as texts, and used for nothing else. In front of the prompt comes what the
            tokenizer puts there (BOS), unless the text brings it; the response is tokenised without special tokens, and the
            two are concatenated. Nothing is appended to either and no chat template is applied: an end-of-sequence token
            the sampler produced must be in the text. Tokenising a
            text need not give back the tokens that were sampled, so token ids are better where they can be had.

    Raises:
        RolloutsFileError: the file cannot be read or a row is bad. The message gives the line (JSON Lines, counted from
            1) or row (Parquet, counted from 0), what is wrong and what to do. A file whose arrays would take more than
            2 GiB each is refused before they are made, and so are pipes and devices.
    """
    path = Path(path)
    kind = format_of(path)
    source = RowSource(path, kind.place, kind.first)
    try:
        return rollouts_from_rows(kind.iterate(source), source, tokenizer)
    except OSError as error:
        source.fail_file(
            f"the file cannot be opened or read ({error.strerror or error}).",
            fix="pass the path of an existing, readable file.",
            cause=error,
        )
    except MemoryError as error:
        source.fail_file("there is not enough memory to read it.", fix="split the file.", cause=error)


def write_rollouts(rollouts: Rollouts, path: str | os.PathLike[str]) -> None:
    """Write rollouts so that `read_rollouts` gives the same content back.

    Token ids and loss masks are written without padding (what ``attention_mask`` leaves out is lost), floats as
    doubles: float32 values come back as float64 of the same value. The file appears under its name only when it is
    complete; on an error an existing file stays as it was.

    Args:
        rollouts: what to write, on any device.
        path: a ``.jsonl`` or ``.parquet`` file in an existing directory; replaced if it exists.

    Raises:
        RolloutsFileError: the suffix is not supported, or a text cannot be stored in UTF-8.
        OutputFileError: the file cannot be written.
    """
    path = Path(path)
    kind = format_of(path)
    with atomic_path(path) as temporary:
        try:
            kind.write(table_from_rollouts(rollouts), temporary)
        except UnicodeEncodeError as error:
            raise RolloutsFileError(
                f"{path}: a prompt or response text cannot be stored in UTF-8 ({error.reason}).",
                fix="write .jsonl, or replace the text: it holds half of a surrogate pair.",
            ) from error
