"""The optimizer's step as geometry: what turns a gradient into a parameter change."""

from entropy_fast.geometry.adam_state import AdamGroup, AdamState, ParameterMoments
from entropy_fast.geometry.optimizer_file import adam_state_from_file
from entropy_fast.geometry.preconditioner import AdamPreconditioner, ExcludedElements

__all__ = [
    "AdamGroup",
    "AdamPreconditioner",
    "AdamState",
    "ExcludedElements",
    "ParameterMoments",
    "adam_state_from_file",
]
