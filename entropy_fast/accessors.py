"""Accessors: what an object offers of layers above its own, such as ``result.plot``.

Drawing knows results, so results cannot import drawing. They name what they offer, the package's ``__init__`` says where it
is, and it is imported when it is used first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["Accessor", "accessed", "register_accessor"]

_HOME: dict[str, str] = {}


def register_accessor(name: str, home: str) -> None:
    """Say where the callable is that makes an accessor of an object.

    Args:
        name: of the accessor, such as "result.plot".
        home: dotted module, a colon, and the callable's name in it.
    """
    _HOME[name] = home


def accessed(name: str) -> Callable[[Any], Any]:
    """The callable that was registered under the name, imported now."""
    module, _, attribute = _HOME[name].partition(":")
    found: Callable[[Any], Any] = getattr(import_module(module), attribute)
    return found


class Accessor:
    """A class attribute that, of an instance, is what was registered under ``name`` made of that instance.

    Args:
        name: as given to `register_accessor`.
        doc: one line on what it gives.
    """

    def __init__(self, name: str, doc: str) -> None:
        self.name = name
        self.__doc__ = doc

    def __get__(self, instance: object | None, owner: type) -> Any:
        return self if instance is None else accessed(self.name)(instance)
