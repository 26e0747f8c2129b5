"""The optimizer's step as geometry: what turns a gradient into a parameter change."""

from entropy_fast.step.adam_state import AdamGroup, AdamState, ParameterMoments
from entropy_fast.step.optimizer_file import adam_state_from_file, adam_state_of
from entropy_fast.step.preconditioner import AdamPreconditioner, ExcludedElements

__all__ = [
    "AdamGroup",
    "AdamPreconditioner",
    "AdamState",
    "ExcludedElements",
    "ParameterMoments",
    "adam_state_from_file",
    "adam_state_of",
]
