"""What a caller may add to a foreign batch, and what a reader is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import Rollouts

__all__ = ["Reader", "ReaderOptions", "lacking"]


@dataclasses.dataclass(frozen=True)
class ReaderOptions:
    """What the caller gives beside a batch; each takes precedence over what the batch holds.

    Attributes:
        groups: N group ids, integers or texts: sequences that answer one prompt have the same.
        advantages: N numbers, one for every sequence; or N lists of one number for every response token.
        tokenizer: for formats of texts. Others do not look at it.
        max_lengths: generation budget in tokens, one number or one for every prompt in order of first appearance.
        temperature: at which the responses were sampled.
    """

    groups: Any = None
    advantages: Any = None
    tokenizer: Any = None
    max_lengths: Any = None
    temperature: float | None = None


@dataclasses.dataclass(frozen=True)
class Reader:
    """A format and how it is read.

    Attributes:
        name: what `rollouts_from` knows it by.
        read: from a batch and the caller's options to rollouts.
        lacks: what batches of the format never hold, or need not hold, and the option that supplies it.
    """

    name: str
    read: Callable[[Any, ReaderOptions], Rollouts]
    lacks: Mapping[str, str]


def lacking(reader: str, what: str, field: str, option: str) -> RolloutsError:
    """The error of a batch that lacks something only the caller can know.

    Args:
        reader: the name of the format.
        what: what is missing, in words.
        field: where the format would hold it.
        option: the option of `rollouts_from` that supplies it.
    """
    return RolloutsError(
        f"{reader}: the batch holds no {what} ({field}).", fix=f"pass `{option}` to rollouts_from({reader!r}, ...)."
    )
