"""The fields of one row of a rollouts file: which exist, what each may hold, and how a bad one is reported."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import math
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from entropy_fast.errors import RolloutsFileError
from entropy_fast.scalars import as_number

__all__ = [
    "FIELDS",
    "LARGEST_ARRAY_BYTES",
    "SAMPLING_FIELDS",
    "TOKEN_FIELDS",
    "Floats",
    "Integers",
    "RowSource",
    "check_keys",
    "convert",
    "open_regular",
]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FIELDS = (
    "group_id", "input_ids", "loss_mask", "prompt_token_ids", "response_token_ids", "prompt", "response",
    "advantage", "reward", "max_length", "old_logprobs", "ref_logprobs", "token_weights", "temperature", "top_p",
    "top_k", "min_p",
)  # fmt: skip
# Lists of a number for every response token.
TOKEN_FIELDS = ("old_logprobs", "ref_logprobs", "token_weights")
# How responses were sampled: one number a file.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p")
FORMS = (("input_ids", "loss_mask"), ("prompt_token_ids", "response_token_ids"), ("prompt", "response"))
FORMS_TEXT = "`input_ids` + `loss_mask`, `prompt_token_ids` + `response_token_ids`, or `prompt` + `response` (texts)"
INT64 = np.iinfo(np.int64)
SHOWN_KEYS = 8

# Bytes of one array [N, T] that a file may ask for (2^28 tokens with their padding). A few bytes can ask for any size: one
# long row among many short ones, or a run of one value in Parquet.
LARGEST_ARRAY_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class RowSource:
    """The file rows come from, for messages.

    Attributes:
        path: the file.
        unit: what a position counts, "line" or "row".
        first: the position of the first one (1 for lines, 0 for rows).
    """

    path: Path
    unit: str
    first: int

    def fail(
        self,
        position: int,
        problem: str,
        *,
        fix: str,
        cause: Exception | None = None,
        kind: type[RolloutsFileError] = RolloutsFileError,
    ) -> NoReturn:
        """Raise the error of the line or row at ``position``."""
        where = f"{self.unit} {position} ({self.unit}s are counted from {self.first})"
        raise kind(f"{self.path}, {where}: {problem}", fix=fix) from cause

    def fail_file(self, problem: str, *, fix: str, cause: Exception | None = None) -> NoReturn:
        """Raise an error of the file as a whole."""
        raise RolloutsFileError(f"{self.path}: {problem}", fix=fix) from cause


def open_regular(path: Path) -> BinaryIO:
    """The file opened for reading bytes; a pipe or a device, which may never end or never begin, is refused.

    Raises:
        OSError: it cannot be opened, or is neither a file nor (which opening refuses by itself) a folder.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a regular file but a pipe, socket or device", str(path))
    return path.open("rb")


def check_keys(keys: Collection[str], source: RowSource, position: int) -> tuple[str, str]:
    """The pair of keys (one of `FORMS`) that holds the tokens of a row with these keys.

    Raises:
        RolloutsFileError: a key is unknown or missing, or tokens are given in two forms.
    """
    unknown = [key for key in keys if key not in FIELDS]
    if unknown:
        close = difflib.get_close_matches(_cut(unknown[0]), FIELDS, n=1)
        meant = f"did you mean `{close[0]}`? " if close else ""
        source.fail(
            position, f"unknown keys: {', '.join(f'`{_cut(key)}`' for key in unknown[:SHOWN_KEYS])}"
            f"{'' if len(unknown) <= SHOWN_KEYS else f' and {len(unknown) - SHOWN_KEYS} others'}.",
            fix=f"{meant}Rename or drop them; known keys: {', '.join(FIELDS)}.",
        )  # fmt: skip
    # Texts may stand beside token ids (they are kept for reports): they are the form only when nothing else is.
    given = [form for form in FORMS[:2] if not set(form).isdisjoint(keys)] or [FORMS[2]]
    if len(given) > 1:
        source.fail(
            position, "tokens are given in two forms: `input_ids`, `loss_mask` and `prompt_token_ids`, "
            "`response_token_ids`.",
            fix="keep one of them.",
        )  # fmt: skip
    missing = [key for key in ("group_id", *given[0]) if key not in keys]
    if missing:
        source.fail(
            position, f"missing keys: {', '.join(f'`{key}`' for key in missing)}.",
            fix=f"every row needs `group_id`, `advantage` or `reward`, and its tokens as {FORMS_TEXT}.",
        )  # fmt: skip
    if "advantage" not in keys and "reward" not in keys:
        source.fail(
            position, "missing keys: neither `advantage` nor `reward` is there.",
            fix="give `advantage`, or `reward`, from which group-centred advantages are made.",
        )  # fmt: skip
    return given[0]


def convert(key: str, value: Any, source: RowSource, position: int) -> Any:
    """The value of ``key`` checked and in the type later stages use.

    Returns:
        An int or str (group_id), an int (max_length, top_k), a float (advantage, reward, the other `SAMPLING_FIELDS`), a str
        (texts), an int64 array [tokens] (token ids and the loss mask) or a float64 array [response tokens] (`TOKEN_FIELDS`).

    Raises:
        RolloutsFileError: the value has the wrong type or is out of range.
    """

    def fail(expected: str, cause: Exception | None = None) -> NoReturn:
        source.fail(position, f"`{key}` is {_shown(value)}; expected {expected}.", fix=_FIXES[key], cause=cause)

    return _CONVERTERS[key](value, fail)


Fail = Callable[..., NoReturn]


def _group_id(value: Any, fail: Fail) -> int | str:
    if type(value) is str:
        return value
    if type(value) is not int or not INT64.min <= value <= INT64.max:
        fail("a 64-bit integer or a string")
    return value


def _max_length(value: Any, fail: Fail) -> int:
    if type(value) is not int or not 1 <= value <= INT64.max:
        fail("an integer of at least 1")
    return value


def _top_k(value: Any, fail: Fail) -> int:
    if type(value) is not int or not -1 <= value <= INT64.max:
        fail("an integer of at least 1, or 0 or -1 for none")
    return value


def _number(value: Any, fail: Fail) -> float:
    plain = as_number(value)
    if plain is None:
        fail("a number")
    try:
        number = float(plain)
    except OverflowError as error:
        fail("a number that fits a 64-bit float", error)
    if not math.isfinite(number):
        fail("a finite number")
    return number


def _numbers(value: Any, fail: Fail) -> Floats:
    if isinstance(value, np.ndarray):
        numbers = value.astype(np.float64)
    elif type(value) is list and set(map(type, value)) <= {float, int}:
        try:
            numbers = np.array(value, dtype=np.float64)
        except OverflowError as error:
            fail("numbers that fit 64-bit floats", error)
    else:
        fail("a list of numbers")
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        fail("a list of finite numbers")
    return numbers


def _text(value: Any, fail: Fail) -> str:
    if type(value) is not str:
        fail("a string")
    return value


def _token_ids(value: Any, fail: Fail) -> Integers:
    ids = _integers(value, fail, "a list of integers", allow_booleans=False)
    if ids.size and ids.min() < 0:
        fail(f"token ids of at least 0, found {int(ids.min())}")
    return ids


def _loss_mask(value: Any, fail: Fail) -> Integers:
    mask = _integers(value, fail, "a list of 0 and 1", allow_booleans=True)
    if mask.size and (mask.min() < 0 or mask.max() > 1):
        fail("a list of 0 and 1")
    return mask


def _integers(value: Any, fail: Fail, expected: str, *, allow_booleans: bool) -> Integers:
    if isinstance(value, np.ndarray):  # a Parquet list column whose cells all have one element type
        if value.dtype.kind not in ("iub" if allow_booleans else "iu"):
            fail(f"{expected}, found elements of type {value.dtype}")
        if value.dtype == np.uint64 and value.size and value.max() > INT64.max:
            fail("64-bit integers")
        return value.astype(np.int64)
    if type(value) is not list:
        fail(expected)
    kinds = set(map(type, value))
    if kinds - {int} and not (allow_booleans and kinds == {bool}):
        names = sorted("null" if kind is type(None) else kind.__name__ for kind in kinds - {int})
        fail(f"{expected}, found elements of type {', '.join(names)}")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        fail("64-bit integers", error)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    try:
        return _cut(str(value.tolist()) if isinstance(value, np.ndarray) else repr(value))
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, lists in lists in lists
        return f"a {type(value).__name__} that cannot be shown"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


_CONVERTERS: dict[str, Callable[[Any, Fail], Any]] = {
    "group_id": _group_id,
    "input_ids": _token_ids,
    "loss_mask": _loss_mask,
    "prompt_token_ids": _token_ids,
    "response_token_ids": _token_ids,
    "prompt": _text,
    "response": _text,
    "advantage": _number,
    "reward": _number,
    "max_length": _max_length,
    **dict.fromkeys(TOKEN_FIELDS, _numbers),
    "temperature": _number,
    "top_p": _number,
    "top_k": _top_k,
    "min_p": _number,
}
_LIST_FIX = "write an unpadded list; padding (-100 included) does not belong in the file."
_OPTIONAL_FIX = "correct it, or leave the key out of every row when it is not known."
_FIXES = {
    "group_id": "give rows that answer the same prompt the same id, an integer or a string.",
    "input_ids": _LIST_FIX,
    "loss_mask": "write one 0 or 1 (1 at response tokens) per entry of `input_ids`.",
    "prompt_token_ids": _LIST_FIX,
    "response_token_ids": _LIST_FIX,
    "prompt": "write a string, or leave the key out of every row if token ids are given.",
    "response": "write a string, or leave the key out of every row if token ids are given.",
    "advantage": "write a finite number; for a group without reward spread the advantage is 0.",
    "reward": "write a finite number, or leave `reward` out of every row and give `advantage`.",
    "max_length": _OPTIONAL_FIX,
    "old_logprobs": "write the log-prob (nats) of every response token, in order, or leave the key out of every row.",
    "ref_logprobs": "write the log-prob (nats) of every response token, in order, or leave the key out of every row.",
    "token_weights": "write a number for every response token, in order, or leave the key out of every row.",
    **dict.fromkeys(SAMPLING_FIELDS, _OPTIONAL_FIX),
}
