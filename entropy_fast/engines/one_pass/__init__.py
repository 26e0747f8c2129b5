"""Everything from one forward and few backwards of the batch, by capture."""

from entropy_fast.engines.engine import EngineKind
from entropy_fast.engines.one_pass.engine import OnePassEngine

__all__ = ["KIND", "OnePassEngine"]

KIND = EngineKind(
    "one_pass",
    OnePassEngine,
    takes=frozenset(
        {
            "accumulate_on",
            "autocast_dtype",
            "checkpoint",
            "checkpoint_seconds",
            "by_sequence",
            "by_token",
            "full_kernel",
            "max_excluded_share",
            "memory_budget",
            "prompts_per_microbatch",
            "rank_timeout",
            "ranks",
            "strict",
        }
    ),
    by_layer=True,
)
