"""The engines that are known, and which one `auto` is.

To add one, write a class with the members of `Engine` and register an `EngineKind` of it.
"""

from __future__ import annotations

from entropy_fast.config import RunOptions
from entropy_fast.engines import forward_mode, one_pass, two_pass
from entropy_fast.engines.engine import COMMON, EngineKind
from entropy_fast.errors import ConfigError

__all__ = ["AUTO", "engine_kind", "engine_kinds", "register_engine"]

AUTO = "auto"

# In the order in which `auto` asks them.
_KINDS: dict[str, EngineKind] = {kind.name: kind for kind in (one_pass.KIND, two_pass.KIND, forward_mode.KIND)}


def register_engine(kind: EngineKind) -> EngineKind:
    """Make an engine known, after those that are, or in place of one of its name. Returns it."""
    _KINDS[kind.name] = kind
    return kind


def engine_kinds() -> tuple[EngineKind, ...]:
    """All that are known."""
    return tuple(_KINDS.values())


def engine_kind(options: RunOptions) -> EngineKind:
    """The engine that the options ask for, with which they agree.

    Raises:
        ConfigError: there is none of that name, or it has no use for an option that is set.
    """
    if options.engine == AUTO:
        asked = set(options.changed()) - COMMON
        for kind in engine_kinds():
            if asked <= kind.takes:
                return kind
        raise ConfigError(
            f"RunOptions: no engine takes all of {', '.join(sorted(asked))}.",
            fix="leave one out, or name the engine to see which.",
        )
    if options.engine not in _KINDS:
        names = ", ".join(map(repr, (AUTO, *_KINDS)))
        raise ConfigError(f"engine is {options.engine!r}.", fix=f"use one of {names}.")
    kind = _KINDS[options.engine]
    for name in kind.ignored(options):
        others = ", ".join(f"engine={other.name!r}" for other in engine_kinds() if name in other.takes)
        raise ConfigError(
            f"RunOptions: `{name}` is {getattr(options, name)!r}, and engine {kind.name!r} has no use for it.",
            fix=f"leave `{name}` out, or pass {others}.",
        )
    return kind
