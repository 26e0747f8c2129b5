"""Cases of sums_of_blocks as call files, and what the kernel made of them against csrc/softmax_block.h in float64."""

from __future__ import annotations

import dataclasses

import torch
from kernel_calls import STATE_FIELDS
from kernel_drivers import ELEMENT_TYPES, CallImage, CallResults, Place
from logprob_cases import accumulator
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BlockSumsCalls:
    """One call in an image, and what it was called with."""

    sums: list[Tensor]
    products: list[Tensor]
    state: Tensor
    places: list[Place]


def block_sums_calls(
    dtype: torch.dtype, image: CallImage, *, width: int, entropy: bool, with_products: bool
) -> BlockSumsCalls:
    """Five rows: nothing changes, a risen maximum, a moved centre, both, and a maximum out of sight."""
    generator = torch.Generator().manual_seed(width)
    state = torch.zeros(5, len(STATE_FIELDS), dtype=torch.float64)
    state[:, STATE_FIELDS.index("factor")] = torch.tensor([1.0, 0.25, 1.0, 1e-3, 0.0], dtype=torch.float64)
    state[:, STATE_FIELDS.index("center_shift")] = torch.tensor([0.0, 0.0, -1.5, 0.75, 2.0], dtype=torch.float64)

    def random(of: torch.dtype) -> list[Tensor]:
        return [torch.randn(5, width, generator=generator, dtype=torch.float64).to(of) for _ in range(1 + entropy)]

    sums = random(accumulator(dtype))
    products = random(dtype) if with_products else []
    places = [image.add(tensor) for tensor in sums]
    fields = [[*places, None][:2], [*(image.add(tensor) for tensor in products), None, None][:2]]
    image.call("sums_of_blocks", *fields[0], *fields[1], image.add(state), 5, width, ELEMENT_TYPES[dtype])
    return BlockSumsCalls(sums, products, state, places)


def assert_block_sums(calls: BlockSumsCalls, results: CallResults) -> None:
    """sum1 factor + product1, and (sum2 + shift sum1) factor + product2, each within a few roundings of its terms."""
    factor = calls.state[:, STATE_FIELDS.index("factor")].unsqueeze(1)
    shift = calls.state[:, STATE_FIELDS.index("center_shift")].unsqueeze(1)
    before = [tensor.double() for tensor in calls.sums]
    products = [tensor.double() for tensor in calls.products] or [torch.zeros_like(tensor) for tensor in before]
    terms = [[before[0] * factor, products[0]]]
    if len(before) > 1:
        terms.append([before[1] * factor, shift * before[0] * factor, products[1]])
    for place, tensor, parts in zip(calls.places, calls.sums, terms, strict=True):
        found = results.tensor(place, tensor.dtype, *tensor.shape).double()
        allowed = 4 * torch.finfo(tensor.dtype).eps * sum(part.abs() for part in parts)
        assert ((found - sum(parts)).abs() <= allowed).all()
