"""Rollouts: the sampled sequences a probe is computed from, checked once on the way in."""

from entropy_fast.rollouts.container import EmptyResponseReport, Rollouts
from entropy_fast.rollouts.files import read_rollouts, write_rollouts
from entropy_fast.rollouts.formats import RolloutsFormat, format_of, register_format

__all__ = [
    "EmptyResponseReport",
    "Rollouts",
    "RolloutsFormat",
    "format_of",
    "read_rollouts",
    "register_format",
    "write_rollouts",
]
