"""Whole tensors of sharded ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from entropy_fast.distributed.team import Team
from entropy_fast.sharded.fsdp2 import is_sharded

__all__ = ["gathered"]


def gathered(team: Team, tensor: Any) -> Any:
    """The whole of a tensor, on every rank; R ranks send (R - 1)/R of its bytes each. What is no DTensor is returned as it is.

    Args:
        team: the ranks, all of which have to come here.
        tensor: possibly sharded.

    Raises:
        DistributedError: a rank failed or was lost.
    """
    if not is_sharded(tensor):
        return tensor
    found: list[Tensor] = []
    team.run(lambda _: found.append(tensor.detach().full_tensor()))
    return found[0]
