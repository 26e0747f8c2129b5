"""The influence kernel between units whose gradients are kept on several ranks.

Legend: X_u gradient of unit u in a functional column, Y_u its preconditioned gradient in an update column, K_uw = X_u · Y_w, P
elements of the parameters, R ranks, n units of a rank.

Every rank gets a slice of the elements, of all units: P/R of each X_u and Y_u. K is the sum of the slices' kernels. A rank
sends (R - 1)/R · n · P elements a column, and holds a slice of at most `_SLICE` elements of all units at a time. Where ranks
have all units' gradients of parameters of their own, nothing has to be sent but their kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from entropy_fast.distributed.collectives import add_up, by_slices
from entropy_fast.distributed.dealing import Share
from entropy_fast.distributed.layout import Layout
from entropy_fast.engines.gradient_sum import row_products
from entropy_fast.engines.kernel import kernel_of

__all__ = ["kernels_of"]

_SLICE = 1 << 20  # elements of a unit in one exchange

Kernel = tuple[Tensor, Tensor]  # [units, units] K and [parameters] every parameter's Σ_u K_uu, fp64 on the CPU


def kernels_of(
    share: Share,
    x_stacks: Sequence[Sequence[Tensor]],
    y_stacks: Sequence[Sequence[Tensor]],
    layout: Layout | None = None,
) -> list[list[Kernel]]:
    """By update and functional, K of all units and its diagonal by parameter.

    Args:
        share: the units of this rank.
        x_stacks: of every functional column ``[n, *shape]`` X per parameter, of this rank's units.
        y_stacks: of every update column likewise Y.
        layout: which of the gradients this rank has; None for all parameters of its own units.

    Raises:
        DistributedError: a rank was lost.
    """
    team = share.team
    if layout is not None and layout.dealt is not None:
        return _of_parameters(layout, x_stacks, y_stacks)
    if team.size == 1:
        return [[kernel_of(x_stack, y_stack) for x_stack in x_stacks] for y_stack in y_stacks]
    team.enter("influence kernel")
    n_units, counts = len(share.every), [len(numbers) for numbers in share.dealt]
    kernels = torch.zeros(len(y_stacks), len(x_stacks), n_units, n_units, dtype=torch.float64)
    diagonals = torch.zeros(len(y_stacks), len(x_stacks), len(x_stacks[0]), dtype=torch.float64)
    for slices in zip(*(_slices(stack, team.size) for stack in (*x_stacks, *y_stacks)), strict=True):
        mine = [by_slices(team, own, counts) for own in slices]
        for which, y in enumerate(mine[len(x_stacks) :]):
            for place, x in enumerate(mine[: len(x_stacks)]):
                kernels[which, place] += kernel_of([x], [y])[0]
    for which, y_stack in enumerate(y_stacks):
        for place, x_stack in enumerate(x_stacks):
            for index, (x, y) in enumerate(zip(x_stack, y_stack, strict=True)):
                if len(x):
                    diagonals[which, place, index] = row_products(x.flatten(1), y.flatten(1)).sum()
    add_up(team, [kernels, diagonals])
    # From the order of ranks to that of units.
    back = torch.tensor([number for numbers in share.dealt for number in numbers]).argsort()
    kernels = kernels[:, :, back][:, :, :, back]
    return [list(zip(*of_update, strict=True)) for of_update in zip(kernels, diagonals, strict=True)]


def _of_parameters(
    layout: Layout, x_stacks: Sequence[Sequence[Tensor]], y_stacks: Sequence[Sequence[Tensor]]
) -> list[list[Kernel]]:
    """From gradients of all units in the parameters of this rank."""
    layout.team.enter("influence kernel")
    own = [[kernel_of(x_stack, y_stack) for x_stack in x_stacks] for y_stack in y_stacks]
    add_up(layout.team, [kernel for of_update in own for kernel, _ in of_update])
    return [[(kernel, layout.of_all_parameters(diagonal)) for kernel, diagonal in of_update] for of_update in own]


def _slices(stack: Sequence[Tensor], ranks: int) -> Iterator[Tensor]:
    """``[n, E]`` successive elements of all parameters of one dtype and device, E a multiple of the ranks; the last padded."""
    waiting: list[Tensor] = []
    for place, tensor in enumerate(stack):
        flat = tensor.reshape(len(tensor), tensor.shape[1:].numel())
        for part in torch.split(flat, _SLICE, 1):
            waiting.append(part)
            if sum(own.shape[1] for own in waiting) >= _SLICE:
                yield _padded(waiting, ranks)
                waiting = []
        following = stack[place + 1] if place + 1 < len(stack) else None
        if waiting and (following is None or (following.dtype, following.device) != (tensor.dtype, tensor.device)):
            yield _padded(waiting, ranks)
            waiting = []


def _padded(parts: Sequence[Tensor], ranks: int) -> Tensor:
    whole = torch.cat(list(parts), 1)
    return torch.nn.functional.pad(whole, (0, -whole.shape[1] % ranks))
