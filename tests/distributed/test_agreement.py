"""Fingerprints of what has to be alike on all ranks: a difference anywhere is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from probe_models.batches import make_rollouts

from entropy_fast import EstimateOptions
from entropy_fast.distributed.agreement import _put_together, _taken_apart, fingerprint, sum_of_bits
from entropy_fast.estimates.kernel_sums import KernelSums


def test_the_same_has_the_same_fingerprint():
    assert fingerprint(make_rollouts((2, 3))) == fingerprint(make_rollouts((2, 3)))
    assert fingerprint([torch.ones(2), {"a": 1.0}]) == fingerprint([torch.ones(2), {"a": 1.0}])


@pytest.mark.parametrize("field", ["input_ids", "loss_mask", "group_ids", "advantages", "max_lengths"])
def test_every_field_of_rollouts_counts(field):
    batch = make_rollouts((2, 3))
    values = getattr(batch, field).clone()
    other = dataclasses.replace(batch)
    values.view(-1)[-1] += 1
    object.__setattr__(other, field, values)
    assert fingerprint(batch) != fingerprint(other)


@pytest.mark.parametrize(
    "pair",
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(1), -torch.zeros(1)),
        ([1, 2], [12]),
        (None, "None"),
        (1.0, 1),
        (EstimateOptions(), EstimateOptions(blocks=2)),
    ],
)
def test_what_differs_has_another(pair):
    assert fingerprint(pair[0]) != fingerprint(pair[1])


def test_a_single_bit_of_a_large_tensor_shows():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8):
        tensor = torch.arange(1, 101).to(dtype)
        other = tensor.clone()
        word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        other.view(word)[37] ^= 1
        assert sum_of_bits(tensor) != sum_of_bits(other)


def test_what_was_found_comes_together_again_with_the_first_rank_s_numbers():
    sums = KernelSums(
        1.5, torch.tensor([1.0, float("nan")], dtype=torch.float64), None, unit_sizes=torch.tensor([2, 3])
    )
    found = {"a": (sums, "text"), "b": [2.5, True, None]}
    numbers: list[torch.Tensor] = []
    _taken_apart(found, numbers)
    assert [number.numel() for number in numbers] == [1, 2, 1, 1]  # clip is one
    again = _put_together(found, iter([number + 1 for number in numbers]))
    assert again["a"][0].x_dot_y == 2.5 and again["a"][0].row_sums[0] == 2.0 and again["a"][0].row_sums.isnan()[1]
    assert torch.equal(again["a"][0].unit_sizes, sums.unit_sizes) and again["a"][0].column_sums is None
    assert again["a"][1] == "text" and again["b"] == [3.5, True, None]
