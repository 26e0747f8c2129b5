"""Which way a model goes: the first of those that are known and have no reason against it."""

from __future__ import annotations

import dataclasses

from entropy_fast.capture import CapturedModules
from entropy_fast.context import ProbeContext
from entropy_fast.ways.packed import PackedWay
from entropy_fast.ways.padded import HiddenStatesWay, LogitsWay
from entropy_fast.ways.trial import Trial
from entropy_fast.ways.way import Way, WayKind

__all__ = ["Choice", "choose_way", "register_way", "way_kinds"]

_KINDS: list[WayKind] = [PackedWay, HiddenStatesWay, LogitsWay]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The way that was taken.

    Attributes:
        way: the way.
        not_taken: for every way before it its name and the reason against it.
    """

    way: Way
    not_taken: tuple[str, ...]


def register_way(kind: WayKind) -> WayKind:
    """Make a way known, before those that are: the last that was registered is asked first. Returns it."""
    _KINDS.insert(0, kind)
    return kind


def way_kinds() -> tuple[WayKind, ...]:
    """All that are known, in the order in which they are asked."""
    return tuple(_KINDS)


def choose_way(context: ProbeContext, modules: CapturedModules, trial: Trial, least: int = 0) -> Choice:
    """Ask one way after the other; the last, the model's own logits, never refuses.

    Args:
        context: of the probe; inside its ``probe_state``.
        modules: whose parameters are captured.
        trial: what they are tried on.
        least: the place of the first that may be taken: another rank of a distributed probe could take none before.

    Raises:
        ModelStateError: log-probs are random, or sequences of one batch interact.
    """
    not_taken: list[str] = []
    for place, kind in enumerate(way_kinds()):
        way = kind(context, modules)
        reason = way.why_not(trial) if place >= least else "another rank cannot take it"
        if reason is None:
            return Choice(way, tuple(not_taken))
        not_taken.append(f"{kind.name}: {reason}")
    raise AssertionError("a way that never refuses is among them")
