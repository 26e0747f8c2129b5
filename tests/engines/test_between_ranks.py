"""Slices of stacks that are exchanged between ranks: every element once, in an order that all ranks share."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_models.batches import make_rollouts

from entropy_fast.distributed import Team
from entropy_fast.distributed.dealing import share_of
from entropy_fast.engines import between_ranks
from entropy_fast.engines.between_ranks import _slices, kernels_of
from entropy_fast.engines.kernel import kernel_of

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple), min_size=1, max_size=5)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 3), st.integers(2, 4), st.integers(1, 9))
def test_slices_have_every_element_once(shapes, units, ranks, most):
    stack = [torch.randn(units, *shape, dtype=torch.float64) for shape in shapes]
    before = between_ranks._SLICE
    between_ranks._SLICE = most
    try:
        found = list(_slices(stack, ranks))
    finally:
        between_ranks._SLICE = before
    assert all(part.shape[1] % ranks == 0 and part.shape[1] < 2 * most + ranks for part in found)
    whole = torch.cat([tensor.reshape(units, tensor.shape[1:].numel()) for tensor in stack], 1)
    together = torch.cat(found, 1)
    kept = [element for element in together.flatten().tolist() if element != 0]
    assert sorted(kept) == sorted(whole.flatten().tolist())


def test_alone_the_kernel_is_that_of_the_stacks():
    batch = make_rollouts((2, 2, 2))
    share = share_of(Team.alone(), batch, [[0], [1], [2]])
    x, y = ([torch.randn(3, 4, 2, dtype=torch.float64)] for _ in range(2))
    (((kernel, diagonals),),) = kernels_of(share, [x], [y])
    assert torch.equal(kernel, kernel_of(x, y)[0])
    assert torch.equal(diagonals, kernel_of(x, y)[1])
