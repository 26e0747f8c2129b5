"""What ranks with slices of one vocabulary say to each other: collectives that autograd can go through, and an agreement.

Every rank runs the same program on the same hidden states. So what comes out of a collective is the same on all ranks, and its
gradient too: going back through a gathering each rank takes its own part, and through a copy the ranks' gradients are added up.
torch's own differentiable collectives are of another kind: there each rank has a loss of its own, and all gradients are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fast.errors import DistributedError, EntropyFastError

__all__ = ["agree", "copied", "gathered", "summed"]

# What a message can show; the others are flags and checksums.
_COUNTS = ("rows", "hidden size", "vocabulary", "ignore_index")


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """``[R, ...]`` of every rank's ``[...]``; its gradient is the own part of what comes back."""
    found: Tensor = _Gathered.apply(tensor, group)  # type: ignore[no-untyped-call]
    return found


def summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum over ranks, the same on all of them; its gradient goes to each rank's part as it is."""
    found: Tensor = _Summed.apply(tensor, group)  # type: ignore[no-untyped-call]
    return found


def copied(tensor: Tensor, group: Any) -> Tensor:
    """The tensor, which all ranks have alike, to be used by each in its own way; its gradient is summed over ranks."""
    found: Tensor = _Copied.apply(tensor, group)  # type: ignore[no-untyped-call]
    return found


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        every = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
        # Into views: the function for one tensor has another name in every other version of torch.
        dist.all_gather(list(every.unbind()), tensor.contiguous(), group=group)
        return every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _OwnPart.apply(grads[0], ctx.group), None  # type: ignore[no-untyped-call]


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, every: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return every[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gathered(grads[0], ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return copied(grads[0], ctx.group), None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0], ctx.group), None


def agree(
    op: str,
    alike: Mapping[str, int],
    rows: tuple[int, int],
    refused: EntropyFastError | None,
    device: torch.device,
    group: Any,
) -> None:
    """Raise on every rank unless all of them call with the same arguments and their rows make one whole.

    So that no rank waits in a later collective for one that does not come, or takes another's numbers for its own.

    Args:
        op: name, for messages.
        alike: what has to be the same on all ranks, by name; the names are the same on all in any case.
        rows: the first row of this rank's slice and how many there are.
        refused: what is wrong with this rank's arguments by themselves; raised here once the others know.
        device: where the group's collectives run.
        group: the process group.

    Raises:
        DistributedError: they do not, the same on all ranks; on the others where one refuses.
        EntropyFastError: ``refused``, on the rank that passed it.
    """
    own = [int(refused is not None), *rows, *alike.values()]
    headers = gathered(torch.tensor(own, device=device), group).tolist()
    if refused is not None:
        raise refused
    names = ("refused", "first", "rows of the slice", *alike)
    for rank, header in enumerate(headers):
        if header[0]:
            raise DistributedError(
                f"{op}: rank {rank} of the group refused its arguments; its own message says why.",
                fix="mend them there; all ranks stopped.",
                ranks=(rank,),
            )
    for rank, header in enumerate(headers):
        for name, value, expected in list(zip(names, header, headers[0], strict=True))[3:]:
            if value != expected:
                shown = f" ({expected} and {value})" if name in _COUNTS else ""
                raise DistributedError(
                    f"{op}: ranks 0 and {rank} of the group differ in {name}{shown}; every rank has to call with the same "
                    "rows, targets and options.",
                    fix="give all ranks that share a vocabulary the same batch, and make the same call on each.",
                    ranks=(0, rank),
                    agreed=True,
                )
    _assert_whole(op, [header[1:3] for header in headers], alike["vocabulary"])


def _assert_whole(op: str, slices: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Every row once."""
    held = [(first, first + rows, rank) for rank, (first, rows) in enumerate(slices) if rows]
    reached = 0
    for first, end, rank in (*sorted(held), (vocabulary, vocabulary, None)):
        if first != reached:
            where = "are on no rank" if first > reached else f"are on rank {rank} and on another"
            raise DistributedError(
                f"{op}: rows {min(first, reached)} to {max(first, reached)} of the vocabulary {where}.",
                fix="give each rank successive rows, each row once.",
                ranks=() if rank is None else (rank,),
                agreed=True,
            )
        reached = end
