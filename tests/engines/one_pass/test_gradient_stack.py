"""Gradients of all units side by side, what is left of them after a halving, and their kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from entropy_fast.capture import GradientRecorder
from entropy_fast.capture.row_recorder import Term
from entropy_fast.engines.kernel import kernel_of
from entropy_fast.engines.one_pass.gradient_stack import GradientStack

# Below, at and above the number of elements that are added up in the accumulator's dtype, and several times it.
SHAPES = ((3,), (5, 7), (4096,), (64, 65), (3, 4096), (5000, 3))


def stacks(n_x: int, n_y: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(n_x)
    return tuple(  # type: ignore[return-value]
        [torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
        for n in (n_x, n_y)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("n_x", "n_y"), [(4, 4), (1, 3), (5, 2)])
def test_kernel(n_x: int, n_y: int, dtype: torch.dtype, tolerance: float) -> None:
    x, y = stacks(n_x, n_y, dtype)
    kernel, diagonals = kernel_of(x, y)
    exact = torch.stack([x[i].double().flatten(1) @ y[i].double().flatten(1).t() for i in range(len(SHAPES))])
    assert kernel.dtype == diagonals.dtype == torch.float64
    size = float(torch.stack([x[i].double().norm() * y[i].double().norm() for i in range(len(SHAPES))]).sum())
    assert float((kernel - exact.sum(0)).abs().max()) < tolerance * size
    assert float((diagonals - exact.diagonal(dim1=1, dim2=2).sum(1)).abs().max()) < tolerance * size


def test_small_products_beside_large_ones_are_kept() -> None:
    """Parts of 4096 elements are added up in fp64: in fp32 the small ones would be lost beside the first."""
    x = torch.ones(1, 4096 * 40)
    x[0, :4096] = 2.0**14
    y = torch.ones(1, 4096 * 40)
    y[0, :4096] = 2.0**14
    kernel, _ = kernel_of([x], [y])
    assert float(kernel) == 4096 * 2.0**28 + 4096 * 39


NAMES = ["a", "b"]


def parameters() -> list[Tensor]:
    return [nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)), nn.Parameter(torch.zeros(4))]


def visit(stack: GradientStack, numbers: list[int], value: float, name: str = "a", *, complete: bool = True) -> None:
    """A group of units whose gradients of one parameter are ``value`` plus the unit's number; X and 10 times it as g."""
    given = dict(zip(NAMES, parameters(), strict=True))
    gradients = GradientRecorder(given, len(numbers), 2, stack.storage(numbers))
    for place, number in enumerate(numbers):
        shape = (2, 3) if name == "a" else (4,)
        gradients.put(name, Term(place, 0, 0, torch.ones(1)), torch.full(shape, value + number, dtype=torch.float64))
        gradients.put(
            name, Term(place, 1, 1, torch.ones(1)), torch.full(shape, 10 * (value + number), dtype=torch.float64)
        )
    if complete:
        stack.collect(numbers, gradients)


@pytest.mark.parametrize("direct", [True, False])
def test_a_group_that_is_taken_up_again(direct: bool) -> None:
    """What a group brought before memory ran out is gone when its halves come."""
    stack = GradientStack(NAMES, parameters(), 4, 2, on_cpu=True)
    stack._direct = direct  # the way that gradients come from a GPU
    visit(stack, [0, 1], 1.0)
    visit(stack, [2, 3], 500.0, complete=False)
    visit(stack, [2], 1.0)
    visit(stack, [3], 700.0, complete=False)
    visit(stack, [3], 1.0)
    assert stack.columns[0][0][:, 0, 0].tolist() == [1, 2, 3, 4]
    assert stack.columns[1][0][:, 1, 2].tolist() == [10, 20, 30, 40]
    assert stack.touched == [True, False]
    assert not stack.columns[0][1].any()


@pytest.mark.parametrize("direct", [True, False])
def test_start_again(direct: bool) -> None:
    stack = GradientStack(NAMES, parameters(), 2, 2, on_cpu=True)
    stack._direct = direct
    visit(stack, [0, 1], 500.0, "b")
    stack.clear()
    assert stack.touched == [False, False]
    visit(stack, [0, 1], 1.0)
    assert stack.touched == [True, False]
    assert not stack.columns[0][1].any() and not stack.columns[1][1].any()
    assert stack.columns[0][0][:, 0, 0].tolist() == [1, 2]


def test_what_is_kept() -> None:
    """Columns one by one; the wider of fp32 and the parameter's dtype; and the bytes of that, told beforehand."""
    given = [*parameters(), nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))]
    for columns in (1, 2, 4):
        stack = GradientStack([*NAMES, "c"], given, 3, columns, on_cpu=True)
        assert [len(column) for column in stack.columns] == [3] * columns
        kept = [tensor for column in stack.columns for tensor in column]
        assert [t.dtype for t in kept] == [torch.float64, torch.float32, torch.float32] * columns
        assert sum(t.numel() * t.element_size() for t in kept) == GradientStack.bytes_of(given, 3, columns)
