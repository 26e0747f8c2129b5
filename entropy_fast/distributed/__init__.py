"""Probes that several processes work on together, on torch.distributed."""

from entropy_fast.distributed.team import Team

__all__ = ["Team"]
