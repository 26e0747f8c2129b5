"""Probes that several processes work on together, on torch.distributed."""

from entropy_fast.distributed.rows import GatheredRows, gather_rows
from entropy_fast.distributed.team import Team, joined

__all__ = ["GatheredRows", "Team", "gather_rows", "joined"]
