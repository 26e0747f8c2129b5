"""Rollouts: the sampled sequences a probe is computed from, checked once on the way in."""

from entropy_fast.rollouts.container import EmptyResponseReport, Rollouts
from entropy_fast.rollouts.files import check_rollouts_path, read_rollouts, write_rollouts

__all__ = ["EmptyResponseReport", "Rollouts", "check_rollouts_path", "read_rollouts", "write_rollouts"]
