"""From JSON back to the frozen dataclasses that were written, by their annotations."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch

from entropy_fast.errors import ConfigError, ResultError
from entropy_fast.schema import Options

__all__ = ["from_json"]

Built = TypeVar("Built")
AGAIN = "run the probe again."
SCALARS = (str, int, bool, float)


def from_json(kind: type[Built], value: Any, where: str) -> Built:
    """A dataclass whose fields were written as JSON has them.

    A number that is null is NaN, in tensors too; a field that is missing has its default. Fields that the class does not have
    are passed over: what was written may be of a class derived from it.

    Args:
        kind: a dataclass of texts, numbers, tensors, tuples, mappings from texts, and other such dataclasses.
        value: what `json` read.
        where: it is from, for messages.

    Raises:
        ResultError: something is missing, or is not of its type; the message names it.
    """
    return cast(Built, _built(kind, value, where))


def _built(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _of_one(inner, value, where)
    if origin is Literal:
        if value not in inner or isinstance(value, bool):
            raise _unlike(f"one of {', '.join(map(str, inner))}", value, where)
        return value
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _unlike("an object", value, where)
        return {_built(inner[0], key, where): _built(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is torch.Tensor:
        return _tensor(value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(cast(Any, kind), value, where)
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and value is None:
        return math.nan
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind not in SCALARS or type(value) is not kind:
        raise _unlike(f"a {getattr(kind, '__name__', kind)}", value, where)
    return value


def _of_one(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Of a union: the first that fits."""
    if value is None and type(None) in kinds:
        return None
    found: ResultError | None = None
    for kind in kinds:
        try:
            return _built(kind, value, where)
        except ResultError as error:
            found = found or error
    assert found is not None
    raise found


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _unlike("a list", value, where)
    if kinds[1:] == (Ellipsis,):
        return tuple(_built(kinds[0], item, where) for item in value)
    if len(value) != len(kinds):
        raise _unlike(f"a list of {len(kinds)}", value, where)
    return tuple(_built(kind, item, where) for kind, item in zip(kinds, value, strict=True))


def _tensor(value: Any, where: str) -> torch.Tensor:
    """fp64, or bool where truth values were written."""

    def known(item: Any) -> Any:
        return [known(one) for one in item] if isinstance(item, list) else math.nan if item is None else item

    if not isinstance(value, list):
        raise _unlike("a list of numbers", value, where)
    try:
        found = torch.tensor(known(value))
        return found if found.dtype == torch.bool else torch.tensor(known(value), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unlike("a list of numbers", value, where) from error


def _dataclass(kind: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _unlike("an object", value, where)
    hints = {} if issubclass(kind, Options) else get_type_hints(kind)  # options look at their values themselves
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            given = value[field.name]
            hint = hints.get(field.name)
            fields[field.name] = given if hint is None else _built(hint, given, f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ResultError(f"{where}: `{field.name}` is missing.", fix=AGAIN)
    try:
        return kind(**fields)
    except ConfigError as error:
        raise ResultError(f"{where}: {error.problem}", fix=AGAIN) from error


def _unlike(expected: str, value: Any, where: str) -> ResultError:
    return ResultError(f"{where} is {str(value)[:80]!r}, expected {expected}.", fix=AGAIN)
