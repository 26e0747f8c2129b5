"""The plain reference: X and Y by backward passes over padded sequences."""

from entropy_fast.engines.engine import EngineKind
from entropy_fast.engines.two_pass.engine import ProbeComponents

__all__ = ["KIND", "ProbeComponents"]

KIND = EngineKind(
    "two_pass",
    ProbeComponents.of,
    takes=frozenset(
        {
            "accumulate_on",
            "autocast_dtype",
            "checkpoint",
            "checkpoint_seconds",
            "conditional_variance",
            "full_kernel",
            "max_excluded_share",
            "prompts_per_microbatch",
            "rank_timeout",
            "ranks",
            "strict",
            "y_pass",
        }
    ),
    refuses=lambda batches, context: (
        "conditional_variance='alpha' is about the entropy batch of the two-batch estimate; here is one batch"
        if batches == 1 and context.run.conditional_variance == "alpha"
        else "checkpoint with full_kernel, for which this engine holds every unit's gradients without writing them"
        if context.run.checkpoint is not None and context.run.full_kernel
        else None
    ),
    no_next_step=lambda estimate, run: (
        "the double backward of conditional_variance='alpha' is along one direction"
        if run.conditional_variance == "alpha"
        else "engine 'two_pass' does not keep the gradients that a live gradient is compared with"
        if estimate.gradient == "live"
        else None
    ),
)
