"""What a slice of a vocabulary may be; its layouts as DTensor are in test_sliced_linear_token_logprobs.py, with real ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from entropy_fast import ops
from entropy_fast.errors import ConfigError
from entropy_fast.ops.vocabulary_slice import is_dtensor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 0, 3), r"weight \(3,\); expected \[rows, H\]"),
        ((torch.zeros(3, 2), 0, 3, torch.zeros(2)), r"weight \(3, 2\) and bias \(2,\)"),
        ((torch.zeros(3, 2), 1, 3), "rows 1 to 4 of a vocabulary of 3"),
        ((torch.zeros(3, 2), -1, 3), "rows -1 to 2 of a vocabulary of 3"),
        ((torch.zeros(0, 2), 0, 0), "a vocabulary of 0"),
    ],
)
def test_rows_that_are_no_slice(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.VocabularySlice(*arguments)


def test_a_slice_without_rows_may_begin_anywhere() -> None:
    assert ops.VocabularySlice(torch.zeros(0, 2), 9, 5, torch.zeros(0)).weight.shape == (0, 2)


def test_a_plain_tensor_is_no_dtensor() -> None:
    assert not is_dtensor(torch.zeros(1)) and not is_dtensor(None)
    with pytest.raises(ConfigError, match="a plain Tensor; expected a DTensor"):
        ops.VocabularySlice.from_dtensor(torch.zeros(3, 2))


def test_layouts_of_dtensors() -> None:
    """On one rank, whose slice is everything."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, weight = init_device_mesh("cpu", (1, 1)), torch.arange(6.0).view(3, 2)
        held = ops.VocabularySlice.from_dtensor(distribute_tensor(weight, mesh, [Replicate(), Shard(0)]))
        assert torch.equal(held.weight, weight) and (held.first, held.vocabulary) == (0, 3)
        for placements, shown in (
            ([Replicate(), Shard(1)], r"Replicate\(\), Shard\(dim=1\)"),
            ([Shard(0), Shard(0)], r"Shard\(dim=0\), Shard\(dim=0\)"),
            ([Replicate(), Replicate()], r"Replicate\(\), Replicate\(\)"),
        ):
            other = distribute_tensor(weight, mesh, placements)
            with pytest.raises(
                ConfigError, match=rf"weight \(3, 2\), a DTensor with placements \({shown}\) on a mesh of"
            ):
                ops.VocabularySlice.from_dtensor(other)
        whole = distribute_tensor(weight, mesh, [Replicate(), Shard(0)])
        with pytest.raises(ConfigError, match="a DTensor as its weight"):
            ops.VocabularySlice(whole, 0, 3)
        with pytest.raises(ConfigError, match=r"bias \(3,\), a plain Tensor; expected both split"):
            ops.VocabularySlice.from_dtensor(whole, torch.zeros(3))
        with pytest.raises(ConfigError, match="a DTensor as hidden"):
            ops.sliced_linear_token_logprobs(whole, held, torch.zeros(3, dtype=torch.int64))
    finally:
        dist.destroy_process_group()
