"""Commands that a launcher has started several times: which process speaks, and how they end together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from entropy_fast.errors import DistributedError

if TYPE_CHECKING:
    from entropy_fast.distributed.team import Team

__all__ = ["launched_ranks", "speaks"]

_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _launched() -> bool:
    return all(name in os.environ for name in _SET_BY_LAUNCHERS)


def speaks(error: BaseException | None = None) -> bool:
    """Whether this process prints for all: the first of those that are left, or any that was not started by a launcher.

    Args:
        error: what ended it; None for nothing.
    """
    if not _launched():
        return True
    lost = error.lost if isinstance(error, DistributedError) else ()
    first = next((rank for rank in range(int(os.environ["WORLD_SIZE"])) if rank not in lost), 0)
    return int(os.environ["RANK"]) == first


@contextlib.contextmanager
def launched_ranks(seconds: float) -> Iterator[Team]:
    """The processes that ``torchrun`` started, `Team.together`; this one alone where it did not.

    Args:
        seconds: that they wait for one another.

    Raises:
        DistributedError: one failed, died or did not come; raised by all that are left.
    """
    from entropy_fast.distributed.team import Team

    if not _launched():
        yield Team.alone()
        return
    import datetime

    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} found no process group: {str(error).splitlines()[0]}",
            fix="start all processes by one launcher (torchrun --nproc-per-node N -m entropy_fast ...).",
        ) from error
    try:
        team = Team.join(seconds)
        try:
            with team.together():
                yield team
        finally:
            team.leave()
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
