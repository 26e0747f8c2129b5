"""The few collective operations that a probe takes; nothing at all for a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_fast.distributed.team import Team

__all__ = ["add_up", "any_of", "by_slices", "least_of", "most_of", "rows_of", "texts_of"]

_BUCKET = 1 << 25  # bytes that small tensors are sent together in


def add_up(team: Team, tensors: Sequence[Tensor]) -> None:
    """Sums over ranks, in place: the same bits on all of them. 2 (R - 1)/R of their bytes are sent by each of R ranks.

    Args:
        team: the ranks.
        tensors: of the same shapes, dtypes and devices on all ranks.

    Raises:
        DistributedError: a rank was lost.
    """
    if team.size == 1:
        return
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            _add_up_one(team, bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        _add_up_one(team, flat)
        start = 0
        for tensor in bucket:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()


def _add_up_one(team: Team, tensor: Tensor) -> None:
    team.run(lambda group: dist.all_reduce(tensor, group=group), tensor.device)


def most_of(team: Team, numbers: Sequence[int]) -> list[int]:
    """The largest of every number over ranks."""
    if team.size == 1:
        return list(numbers)
    table = torch.tensor(list(numbers), dtype=torch.int64)
    team.run(lambda group: dist.all_reduce(table, dist.ReduceOp.MAX, group=group))
    found: list[int] = table.tolist()
    return found


def least_of(team: Team, numbers: Sequence[int]) -> list[int]:
    """The smallest of every number over ranks."""
    return [-number for number in most_of(team, [-number for number in numbers])]


def any_of(team: Team, flags: Sequence[bool]) -> list[bool]:
    """Which flags are set on any rank."""
    return [number > 0 for number in most_of(team, [int(flag) for flag in flags])]


def texts_of(team: Team, own: str) -> list[str]:
    """A text of every rank, in their order."""
    if team.size == 1:
        return [own]
    data = own.encode()
    lengths = [0] * team.size
    lengths[team.rank] = len(data)
    lengths = most_of(team, lengths)
    padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    found = rows_of(team, padded)
    return [bytes(row[:length].tolist()).decode() for row, length in zip(found, lengths, strict=True)]


def rows_of(team: Team, own: Tensor) -> list[Tensor]:
    """A tensor of every rank, in their order; of one shape and dtype."""
    if team.size == 1:
        return [own]
    found = [torch.empty_like(own) for _ in range(team.size)]
    team.run(lambda group: dist.all_gather(found, own.contiguous(), group=group), own.device)
    return found


def by_slices(team: Team, own: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of all ranks in a slice of the columns, which is this rank's: (R - 1)/R of the bytes are sent.

    Args:
        team: R ranks.
        own: [n, E] rows of this rank; E a multiple of R.
        counts: n of every rank.

    Returns:
        [Σ n, E/R] rows in the order of ranks.

    Raises:
        DistributedError: a rank was lost.
    """
    if team.size == 1:
        return own
    n, width = own.shape[0], own.shape[1] // team.size
    send = own.reshape(n, team.size, width).transpose(0, 1).contiguous().view(-1)
    received = own.new_empty(sum(counts) * width)
    received_from, sent_to = [count * width for count in counts], [n * width] * team.size
    team.run(
        lambda group: dist.all_to_all_single(received, send, received_from, sent_to, group=group),
        own.device,
    )
    return received.view(sum(counts), width)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, up to a size; every rank makes the same."""
    waiting: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    held: dict[tuple[torch.dtype, torch.device], int] = {}
    for tensor in tensors:
        if not tensor.numel():
            continue
        key, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        if size >= _BUCKET:
            yield [tensor]
            continue
        waiting.setdefault(key, []).append(tensor)
        held[key] = held.get(key, 0) + size
        if held[key] >= _BUCKET:
            yield waiting.pop(key)
            held[key] = 0
    yield from waiting.values()
