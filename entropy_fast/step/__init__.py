"""The optimizer's step as geometry: what turns a gradient into a parameter change."""

from entropy_fast.step.adam_state import AdamGroup, AdamState, ParameterMoments
from entropy_fast.step.next_step import NextStep
from entropy_fast.step.optimizer_file import adam_state_from_file, adam_state_of
from entropy_fast.step.preconditioner import AdamPreconditioner, ExcludedElements
from entropy_fast.step.reading import (
    GivenOptimizer,
    OptimizerAtHand,
    next_step_of,
    optimizer_from_file,
    preconditioner_of,
    read_optimizer,
)

__all__ = [
    "AdamGroup",
    "AdamPreconditioner",
    "AdamState",
    "ExcludedElements",
    "GivenOptimizer",
    "NextStep",
    "OptimizerAtHand",
    "ParameterMoments",
    "adam_state_from_file",
    "adam_state_of",
    "next_step_of",
    "optimizer_from_file",
    "preconditioner_of",
    "read_optimizer",
]
