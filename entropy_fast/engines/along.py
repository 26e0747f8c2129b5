"""Products of units' gradients with the optimizer's whole step.

Legend: X_u gradient of unit u in a functional column, g_u its ascent gradient in an update column, B prompts, |u| prompts of
unit u, L gradient of the loss as the optimizer sees it, Δθ(L) its step, σ sign and factor with L = σ Σ_u g_u / B.

A unit's own samples are in L, and X_u is made of the same samples. So it meets the step of the others',

    Δθ_{-u} = Δθ((L - σ g_u / B) B / (B - |u|))

which for the part that is linear in L takes the diagonal out of the U-statistic, exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_fast.distributed.collectives import add_up
from entropy_fast.distributed.layout import Layout
from entropy_fast.distributed.team import Team
from entropy_fast.engines.gradient_sum import GradientSum, inner_product, row_products
from entropy_fast.engines.unit_dots import Stack
from entropy_fast.estimates.kernel_sums import AlongStep, KernelSums
from entropy_fast.estimates.measured import GradientAgreement
from entropy_fast.step.next_step import NextStep, clip_factor
from entropy_fast.step.rules import FRESH, SCALE

__all__ = [
    "AlongSums",
    "SeenGradient",
    "along_step",
    "parts_changed",
    "seen_gradient",
    "step_of_others",
    "steps_of_others",
]

ROUNDINGS = 256  # by which two sums of the same numbers, in other orders, may differ, in units of their type
OF_SUMMANDS = 64  # likewise where the numbers cancel, in units of the largest element beside it
LARGEST_ROUNDING = 2.0**-6  # for 16 bits, where that many would be everything
LARGEST_OF_SUMMANDS = 2.0**-8
ELEMENTS_AT_ONCE = 1 << 22  # of units' gradients whose steps are worked out together


@dataclasses.dataclass(frozen=True)
class SeenGradient:
    """What the optimizer sees.

    Attributes:
        step: of the optimizer.
        loss: L, one tensor per parameter; None where none arrived, and then the optimizer passes the parameter by.
        like: tensors of the parameters' shapes.
        own: σ.
        prompts: B.
        clip: what clipping multiplied it by.
        agreement: of a live gradient with the rollouts' own; None where L is that.
    """

    step: NextStep
    loss: list[Tensor | None]
    like: Sequence[Tensor]
    own: float
    prompts: int
    clip: float
    agreement: GradientAgreement | None = None

    @property
    def apart(self) -> tuple[str, ...]:
        """Parts that are measured along the step: all but what the kernel's sums have already."""
        kernel = self.step.rule.linear and self.step.live is None
        return tuple(part for part in self.step.parts if not (kernel and part == FRESH))

    def without(self, place: int, g: Tensor, sizes: Tensor) -> Tensor:
        """``[n, *shape]`` gradient of the loss of the other units, for units' ``g [n, *shape]`` of sizes ``[n]``.

        Where the whole gradient of an element is one unit's (the embedding of a token that no other prompt has), what is left
        is the rounding of two sums that are the same; an Adam that has not seen the element before would make a whole step of
        it. Such remainders are 0. The summands of an element may cancel, so that its rounding is that of larger numbers: it is
        taken to be that of the largest element of the same row.
        """
        loss = self.loss[place]
        assert loss is not None
        left = (self.prompts - sizes).to(g).view(-1, *[1] * (g.dim() - 1))
        whole, own = loss.to(g) * self.prompts, self.own * g
        narrowest = max(torch.finfo(t.dtype).eps for t in (loss, g))
        rounding = min(ROUNDINGS * narrowest, LARGEST_ROUNDING) * (whole.abs() + own.abs())
        if own.dim() > 1:
            beside = own.abs().amax(-1, keepdim=True)
            rounding = torch.maximum(rounding, min(OF_SUMMANDS * narrowest, LARGEST_OF_SUMMANDS) * beside)
        others = whole - own
        return torch.where(others.abs() <= rounding, 0.0, others) / left


def seen_gradient(
    step: NextStep,
    total: GradientSum,
    prompts: int,
    units: Sequence[Tensor] | None = None,
    *,
    exactly: bool = False,
    layout: Layout | None = None,
) -> SeenGradient:
    """From Σ g over a batch, or from what stands in ``.grad``.

    Args:
        step: of the optimizer.
        total: Σ_u g_u, raw.
        prompts: B; with a live gradient those of the whole batch, of which ``total`` may be a sample.
        units: with a live gradient g of every unit per parameter, ``[units, *shape]``; None where they are of another batch.
        layout: what of the gradients other ranks have; None for nothing.
        exactly: with a live gradient, whether g is what is in it (coefficients were given), so that σ need not be estimated.

    Raises:
        OptimizerStateError: the gradient's norm is not finite and is to be clipped.
    """
    layout = layout or Layout(Team.alone())
    sign = 1.0 if step.ascends else -1.0
    if step.live is None:
        loss = [
            t * (sign / prompts) if touched else None for t, touched in zip(total.tensors, total.touched, strict=True)
        ]
        clip = clip_factor(loss, step.max_grad_norm, layout.add_parameters)
        clipped = [None if own is None else own * clip for own in loss]
        return SeenGradient(step, clipped, total.tensors, sign * clip, prompts, clip)
    clip = clip_factor(step.live, step.max_grad_norm, layout.add_parameters)
    live = [
        None if own is None else clip * own.to(device=t.device, dtype=t.dtype)
        for own, t in zip(step.live, total.tensors, strict=True)
    ]
    if units is None:
        return SeenGradient(step, live, total.tensors, math.nan, prompts, clip)
    agreement, scale = _agreement(live, total, units, prompts, sign, layout)
    if exactly:
        scale = clip
    return SeenGradient(step, live, total.tensors, sign * scale, prompts, clip, agreement)


def parts_changed(seen: SeenGradient, place: int, gradients: Tensor) -> Tensor:
    """``[n, *shape]`` all that gradients ``[n, *shape]`` of the loss change in one parameter's step."""
    changed = seen.step.rule.fresh(place, gradients)
    scale = seen.step.rule.scale(place, gradients) if seen.step.rule.linear else None
    return changed if scale is None else changed + scale


def along_step(
    seen: SeenGradient,
    x_stacks: Sequence[Stack],
    g_stack: Stack | None,
    sizes: Tensor,
) -> list[AlongStep]:
    """Rows of every functional column, for some units.

    Args:
        seen: what the optimizer sees.
        x_stacks: of every functional column and parameter X ``[units, *shape]``.
        g_stack: of every parameter raw g ``[units, *shape]``; None where the units' samples are not in L (two batches).
        sizes: [units] prompts of each.

    Returns:
        By column; ``whole`` is the sum of X over these units with the whole step.
    """
    n_parameters, n_units = len(seen.loss), len(sizes)
    rows = [{part: torch.zeros(n_parameters, n_units, dtype=torch.float64) for part in seen.apart} for _ in x_stacks]
    whole = [dict.fromkeys(seen.apart, 0.0) for _ in x_stacks]
    for place, loss in enumerate(seen.loss):
        if loss is None or not seen.step.held[place] or not n_units or all(stack[place] is None for stack in x_stacks):
            continue
        full = seen.step.of_parameter(place, loss)
        for part in seen.apart:
            flat = full[part].reshape(-1)
            by_itself = part in (FRESH, SCALE) and g_stack is not None
            for column, x_stack in enumerate(x_stacks):
                own = x_stack[place]
                if own is None:
                    continue
                x = own.reshape(n_units, -1)
                found = row_products(x, flat.to(x.dtype))
                whole[column][part] += float(found.sum())
                if not by_itself:
                    rows[column][part][place] = found
            if by_itself:
                assert g_stack is not None
                g = g_stack[place]
                if g is None:
                    g = torch.zeros_like(seen.like[place]).expand(n_units, *seen.like[place].shape)
                _rows_of_others(seen, place, part, [stack[place] for stack in x_stacks], g, sizes, rows)
    return [AlongStep(own, of_whole) for own, of_whole in zip(rows, whole, strict=True)]


def _rows_of_others(
    seen: SeenGradient,
    place: int,
    part: str,
    x: Stack,
    g: Tensor,
    sizes: Tensor,
    rows: Sequence[dict[str, Tensor]],
) -> None:
    """Write X_u · Δθ^part_{-u} of one parameter, a few units at a time."""
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, g[0].numel()))
    rule = seen.step.rule
    for start in range(0, len(g), at_once):
        span = slice(start, start + at_once)
        others = seen.without(place, g[span], sizes[span])
        moved = rule.fresh(place, others) if part == FRESH else rule.scale(place, others)
        if moved is None:
            continue
        for column, own in enumerate(x):
            if own is None:
                continue
            rows[column][part][place, span] = row_products(
                own[span].reshape(len(moved), -1), moved.reshape(len(moved), -1)
            )


def steps_of_others(seen: SeenGradient) -> list[Tensor]:
    """The whole Δθ, one tensor per parameter, all parts together."""
    return [step_of_others(seen, place, None, 0) for place in range(len(seen.loss))]


def step_of_others(seen: SeenGradient, place: int, g: Tensor | None, size: int) -> Tensor:
    """Δθ_{-u} of one parameter; Δθ where ``g`` is None."""
    loss = seen.loss[place]
    if loss is None or not seen.step.held[place]:
        return torch.zeros_like(seen.like[place])
    own = loss if g is None else seen.without(place, g.unsqueeze(0), torch.tensor([size]))[0]
    return sum(seen.step.of_parameter(place, own).values(), torch.zeros((), dtype=loss.dtype, device=loss.device))


def _agreement(
    live: Sequence[Tensor | None],
    total: GradientSum,
    units: Sequence[Tensor],
    prompts: int,
    sign: float,
    layout: Layout,
) -> tuple[GradientAgreement, float]:
    """How a live gradient compares with what the rollouts say.

    With n sampled prompts of B and L = σ Σ_m g_m / B, a sampled prompt's product with L is σ (‖g_n‖² / B + (B - 1)/B g·g) on
    average. g·g is estimated without its diagonal, so that σ is not pulled towards 0 by the sample's noise; where a sample's
    noise makes it negative there is nothing but the first term. With all prompts it is ‖Σ g‖² / B², and σ is exact. Returns
    that, and the scale of a prompt's own part (0 where it has none).
    """
    pairs = [(own, t, u) for own, t, u in zip(live, total.tensors, units, strict=True) if own is not None]
    lives, totals = [own for own, _, _ in pairs], [t for _, t, _ in pairs]
    of_ranks = torch.tensor(
        [len(units[0]), sum(float(u.double().square().sum()) for _, _, u in pairs)], dtype=torch.float64
    )
    layout.add_units([of_ranks])
    n = int(of_ranks[0])
    cross, squares, of_live, own_squares = layout.add_parameters(
        [
            inner_product(lives, totals),
            inner_product(totals, totals),
            inner_product(lives, lives),
            float(of_ranks[1]),
        ]
    )
    shared = (squares - own_squares) / (n * (n - 1)) if n > 1 else 0.0
    if n < prompts:
        shared = max(0.0, shared)
    expected = own_squares / n / prompts + (prompts - 1) / prompts * shared
    norms = math.sqrt(squares * of_live)
    cosine = sign * cross / norms if norms else math.nan
    # Without an update of their own, prompts have nothing to be taken out.
    scale = sign * cross / n / expected if expected else 0.0
    return GradientAgreement(cosine, scale if expected else math.nan, n, prompts), scale


class AlongSums:
    """Rows of all units, put together from groups of them.

    Args:
        seen: what the optimizer sees.
        n_columns: functional columns.
        n_units: how many.
    """

    def __init__(self, seen: SeenGradient, n_columns: int, n_units: int) -> None:
        self.seen = seen
        self._rows = [
            {part: torch.zeros(len(seen.loss), n_units, dtype=torch.float64) for part in seen.apart}
            for _ in range(n_columns)
        ]
        self._whole = [dict.fromkeys(seen.apart, 0.0) for _ in range(n_columns)]

    def add(self, numbers: Sequence[int], x_stacks: Sequence[Stack], g_stack: Stack | None, sizes: Tensor) -> None:
        """Measure some units, by their numbers; see `along_step`."""
        found = along_step(self.seen, x_stacks, g_stack, sizes)
        for rows, whole, own in zip(self._rows, self._whole, found, strict=True):
            for part in rows:
                rows[part][:, list(numbers)] += own.rows[part]
                whole[part] += own.whole[part]

    def clear(self) -> None:
        """Back to empty."""
        for rows, whole in zip(self._rows, self._whole, strict=True):
            for part in rows:
                rows[part].zero_()
                whole[part] = 0.0

    def kept(self) -> dict[str, Tensor]:
        """See `entropy_fast.resuming.Accumulator`."""
        whole = torch.tensor([list(own.values()) for own in self._whole], dtype=torch.float64)
        named = {f"{column}/{part}": own for column, rows in enumerate(self._rows) for part, own in rows.items()}
        return {**named, "whole": whole}

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """See `entropy_fast.resuming.Accumulator`."""
        for column, (rows, values) in enumerate(zip(self._rows, found["whole"].tolist(), strict=True)):
            for part, own in rows.items():
                own.copy_(found[f"{column}/{part}"])
            self._whole[column] = dict(zip(rows, values, strict=True))

    def add_ranks(self, layout: Layout) -> None:
        """Rows of what one rank has become those of everything."""
        if layout.team.size == 1:
            return
        whole = torch.tensor([list(own.values()) for own in self._whole], dtype=torch.float64)
        layout.add_units([rows for own in self._rows for rows in own.values()])
        add_up(layout.team, [whole])
        self._rows = [{part: layout.of_all_parameters(rows) for part, rows in own.items()} for own in self._rows]
        self._whole = [
            dict(zip(own, found, strict=True)) for own, found in zip(self._whole, whole.tolist(), strict=True)
        ]

    def put(self, sums: Sequence[KernelSums]) -> list[KernelSums]:
        """Sums of every functional column, with their rows."""
        return [
            dataclasses.replace(own, along=AlongStep(rows, whole), clip=self.seen.clip)
            for own, rows, whole in zip(sums, self._rows, self._whole, strict=True)
        ]
