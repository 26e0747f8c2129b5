"""Forwards that carry derivatives along one direction of the parameters, by torch's forward mode and a few rules more."""

from entropy_fast.engines.engine import EngineKind
from entropy_fast.engines.forward_mode.engine import NO_DIAGONAL, ForwardModeEngine

__all__ = ["KIND", "ForwardModeEngine"]

KIND = EngineKind(
    "jvp",
    ForwardModeEngine,
    takes=frozenset(
        {
            "accumulate_on",
            "autocast_dtype",
            "max_excluded_share",
            "prompts_per_microbatch",
            "rank_timeout",
            "ranks",
            "strict",
            "y_pass",
        }
    ),
    refuses=lambda batches, context: NO_DIAGONAL if batches == 1 else None,
    no_next_step=lambda estimate, run: (
        "engine 'jvp' has derivatives along one direction, and the step has several parts"
    ),
)
