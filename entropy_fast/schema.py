"""The schema of options: a field says its type, its default, its range and a line of help; checks are made from that.

The command line, ``run.json`` and the texts of errors are made from it too. Nothing here touches a model.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from entropy_fast.errors import ConfigError

__all__ = ["OptionField", "Options", "bytes_of", "default_of", "option", "option_fields"]


def option(default: Any, help: str, *, least: float | None = None, most: float | None = None) -> Any:
    """A field of options: its default, a line of help, and the range of a number, ends included."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One option as the command line and ``run.json`` see it.

    Attributes:
        name: of the field.
        kind: what a value is: ``str``, ``int``, ``float`` or ``bool``; a `MemoryBudget` is a str here, a `ClipRange` too.
        choices: the words a value may be; empty where there are none.
        optional: whether None is a value.
        default: the value where none is given.
        help: a line.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str


class Options:
    """Checks every field against its type and range on construction."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, _checked(self, field, getattr(self, field.name)))

    def changed(self) -> tuple[str, ...]:
        """Names of the options that are not what they are by default."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return tuple(field.name for field in fields if getattr(self, field.name) != field.default)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()  # type: ignore[call-overload]
        }


def option_fields(options: type[Options]) -> list[OptionField]:
    """The options of `EstimateOptions` or `RunOptions`, in order."""
    hints = get_type_hints(options)
    found = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        kinds, choices, optional = _taken_apart(hints[field.name])
        kind = str if choices or str in kinds or tuple in kinds else kinds[0]
        found.append(OptionField(field.name, kind, choices, optional, field.default, field.metadata["help"]))
    return found


def default_of(options: type[Options], name: str) -> Any:
    """The default of one option."""
    return next(field.default for field in dataclasses.fields(options) if field.name == name)  # type: ignore[arg-type]


def _taken_apart(hint: Any) -> tuple[list[type], tuple[str, ...], bool]:
    """The types a value may have, the words it may be, and whether it may be None."""
    parts = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    choices = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    kinds = [get_origin(part) or part for part in parts if get_origin(part) is not Literal and part is not type(None)]
    return kinds, choices, type(None) in parts


def _checked(options: Any, field: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the form in which it is kept.

    Raises:
        ConfigError: it is none that the option takes.
    """
    kinds, choices, optional = _taken_apart(get_type_hints(type(options))[field.name])

    def refused(fix: str) -> ConfigError:
        return ConfigError(f"{type(options).__name__}: `{field.name}` is {value!r}.", fix=f"use {fix}.")

    if value is None and optional:
        return None
    if field.name == "parts":
        return _parts(value, refused)
    if choices:
        named = str(value).removeprefix("torch.")
        if named not in choices or isinstance(value, bool):
            raise refused(f"one of {', '.join(choices)}" + (", or leave it out" if optional else ""))
        return named
    if field.name == "clip_range":
        return _clip_range(value, refused)
    if field.name == "memory_budget":
        if bytes_of(value) is None:
            raise refused('a number of bytes, such as 8 * 2**30, or a text such as "8GiB", "500 MB"')
        return value
    (kind,) = kinds
    if kind is bool or kind is str:
        if not isinstance(value, kind):
            raise refused("True or False" if kind is bool else "a name")
        return value
    return _number(kind, field.metadata, value, refused)


def _number(kind: type, limits: Mapping[str, Any], value: Any, refused: Callable[[str], ConfigError]) -> int | float:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of numpy, or a tensor
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise refused("a whole number" if kind is int else "a number")
    least, most = limits["least"], limits["most"]
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        raise refused(f"{least} or more" if most is None else f"a number in [{least}, {most}]")
    number: int | float = value
    return number


def _clip_range(value: Any, refused: Callable[[str], ConfigError]) -> tuple[float, float]:
    """(ε_low, ε_high) from a pair, from one number for both, or from either as text."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (tuple, list)) else (value,)
    fix = "(ε_low, ε_high) with ε_low in [0, 1] and ε_high >= 0, such as (0.2, 0.2) or 0.2 for both"
    try:
        numbers = [math.nan if isinstance(part, bool) else float(part) for part in parts]
    except (TypeError, ValueError, OverflowError) as error:
        raise refused(fix) from error
    if len(numbers) not in (1, 2) or not (0 <= numbers[0] <= 1 and 0 <= numbers[-1] < math.inf):
        raise refused(fix)
    return numbers[0], numbers[-1]


def _parts(value: Any, refused: Callable[[str], ConfigError]) -> tuple[str, ...]:
    """Which parts, from a tuple, a list, or text; the direct one is always among them, since it is what the other is beside."""
    found = tuple(value.split(",") if isinstance(value, str) else value if isinstance(value, (tuple, list)) else ())
    if found not in (("direct",), ("direct", "visitation"), ("visitation", "direct")):
        raise refused("('direct',) or ('direct', 'visitation')")
    return ("direct",) if len(found) == 1 else ("direct", "visitation")


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{i}B": (1024 if i else 1000) ** power for power, prefix in enumerate("KMGT", start=1) for i in ("", "i")
}


def bytes_of(budget: Any) -> int | None:
    """A number of bytes, None where it is not one."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        known = {name.lower(): size for name, size in _UNITS.items()}
        if match is None or match[2].lower() not in known:
            return None
        return int(float(match[1]) * known[match[2].lower()])
    return budget if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0 else None
