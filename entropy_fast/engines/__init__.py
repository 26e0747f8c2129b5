"""Engines: each gets a context, and returns everything it found in one object."""

from entropy_fast.engines.engine import Engine, EngineKind, Scores
from entropy_fast.engines.registry import engine_kind, engine_kinds, register_engine

__all__ = ["Engine", "EngineKind", "Scores", "engine_kind", "engine_kinds", "register_engine"]
