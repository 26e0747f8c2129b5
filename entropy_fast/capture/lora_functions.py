"""The low-rank part of a LoRA layer as one autograd function, with its base or added to what its base gives.

Legend: W and b the base weight and bias, A_k and B_k the factors of adapter k, s_k its scaling.

    y = x W^T + b + Σ_k s_k (x A_k^T) B_k^T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entropy_fast.capture.recorder import Recorder

__all__ = ["Adapter", "added_lora", "with_lora"]


class Adapter(NamedTuple):
    """Factors of one adapter, their names (None: frozen) and its scaling."""

    a: nn.Linear
    b: nn.Linear
    names: tuple[str | None, str | None]
    scaling: float


def with_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], recorder: Recorder
) -> Tensor:
    """Y of ``x`` [..., in] for a frozen base; what the adapters are trained by goes to ``recorder``."""
    result: Tensor = _WithLora.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, adapters, recorder, *_factors(adapters)
    )
    return result


def added_lora(x: Tensor, base: Tensor, adapters: Sequence[Adapter], recorder: Recorder) -> Tensor:
    """Y for ``x`` [..., in], its first two terms given as ``base`` [..., out], in the dtype of ``base``."""
    result: Tensor = _AddedLora.apply(  # type: ignore[no-untyped-call]
        x, base, adapters, recorder, *_factors(adapters)
    )
    return result


class _WithLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: Sequence[Adapter],
        recorder: Recorder,
        *factors: Tensor,
    ) -> Tensor:
        ctx.dtype, ctx.inner_dtype = x.dtype, _product_dtype(factors[0])
        ctx.adapters, ctx.recorder = adapters, recorder
        ctx.merged = _merging_is_cheaper(x, weight, ctx.inner_dtype)
        if ctx.merged:
            ctx.save_for_backward(x, weight, *factors)
            return F.linear(x, _merged(weight, adapters, factors), bias)
        output = F.linear(x, weight, bias)
        kept, inner = _low_rank_of(x, factors, ctx.inner_dtype)
        flat = output.view(-1, output.shape[-1])
        for adapter, low, b in zip(adapters, inner, factors[1::2], strict=True):
            b = b.to(low.dtype)
            if low.dtype == flat.dtype:
                flat.addmm_(low, b.t(), alpha=adapter.scaling)
            else:
                flat.add_(low @ b.t(), alpha=adapter.scaling)
        ctx.save_for_backward(kept, weight, *factors, *inner)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        n_factors = 2 * len(ctx.adapters)
        factors, inner = rest[:n_factors], rest[n_factors:]
        matrix = weight
        if ctx.merged:
            matrix, inner = _merged(weight, ctx.adapters, factors), _low_rank_of(x, factors, ctx.inner_dtype)[1]
        # Added up in the dtype of x, which is wider than that of the products under autocast.
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy.reshape(-1, dy.shape[-1]) @ matrix.to(dy.dtype)).to(ctx.dtype)
        dx = _hand_over(ctx, dy, x, inner, factors, dx, complete=ctx.merged)
        return dx, None, None, None, None, *(None for _ in factors)


class _AddedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, adapters: Sequence[Adapter], recorder: Recorder, *factors: Tensor
    ) -> Tensor:
        ctx.dtype, ctx.inner_dtype = x.dtype, _product_dtype(factors[0])
        kept, inner = _low_rank_of(x, factors, ctx.inner_dtype)
        total = base.reshape(-1, base.shape[-1])
        # Not in place: the base's backward may need what it gave. And no view: a model may add to what a layer gives.
        output = base.new_empty(base.shape)
        into = output.view(total.shape)
        for adapter, low, b in zip(adapters, inner, factors[1::2], strict=True):
            total = torch.add(total, low @ b.to(low.dtype).t(), alpha=adapter.scaling, out=into)
        ctx.save_for_backward(kept, *inner, *factors)
        ctx.adapters, ctx.recorder = adapters, recorder
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        inner, factors = rest[: len(ctx.adapters)], rest[len(ctx.adapters) :]
        dx = _hand_over(ctx, dy, x, inner, factors, None, complete=False)
        return dx, dy, None, None, *(None for _ in factors)


def _merging_is_cheaper(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether W + Σ s_k B_k A_k is to be made and used in place of W.

    With many tokens it costs less than adding s_k (x A_k^T) B_k^T to every output. For 16-bit numbers it is not exact: the sum
    would be rounded to the size of W.
    """
    same = weight.dtype == dtype == x.dtype
    return same and dtype in (torch.float32, torch.float64) and x.numel() >= 2 * x.shape[-1] * x.shape[-1]


def _merged(weight: Tensor, adapters: Sequence[Adapter], factors: Sequence[Tensor]) -> Tensor:
    for adapter, a, b in zip(adapters, factors[::2], factors[1::2], strict=True):
        weight = torch.addmm(weight, b, a, alpha=adapter.scaling)
    return weight


def _low_rank_of(x: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """``x`` in its own dtype or that of the products, whichever is narrower, and x A_k^T [rows, rank] for every k."""
    wide = x.to(dtype)
    flat = wide.reshape(-1, x.shape[-1])
    inner = [flat @ a.to(dtype).t() for a in factors[::2]]
    return (x if x.dtype.itemsize < dtype.itemsize else wide), inner


def _hand_over(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    inner: Sequence[Tensor],
    factors: Sequence[Tensor],
    dx: Tensor | None,
    *,
    complete: bool,
) -> Tensor | None:
    """Give the factors' signals to the recorder.

    Args:
        ctx: of the function.
        dy: gradient of the output [..., out].
        x: the input [..., in].
        inner: x A_k^T [rows, rank] for every k.
        factors: A_k and B_k in turns.
        dx: gradient of the input [rows, in] as far as it is known.
        complete: whether that is all of it.

    Returns:
        The gradient of the input [..., in]; None where none is asked for.
    """
    x, dy = x.to(ctx.inner_dtype), dy.to(ctx.inner_dtype)
    flat = dy.reshape(-1, dy.shape[-1])
    for adapter, low, a, b in zip(ctx.adapters, inner, factors[::2], factors[1::2], strict=True):
        a_name, b_name = adapter.names
        if b_name is not None:
            ctx.recorder.product(b_name, dy, (low * adapter.scaling).view(*dy.shape[:-1], -1))
        d_low = (flat @ b.to(dy.dtype)).mul_(adapter.scaling)
        if a_name is not None:
            ctx.recorder.product(a_name, d_low.view(*dy.shape[:-1], -1), x)
        if complete or not ctx.needs_input_grad[0]:
            continue
        if dx is None:
            dx = (d_low @ a.to(dy.dtype)).to(ctx.dtype)
        elif dx.dtype == dy.dtype:
            dx.addmm_(d_low, a.to(dy.dtype))
        else:
            dx += d_low @ a.to(dy.dtype)
    return None if dx is None else dx.view(*dy.shape[:-1], -1)


def _factors(adapters: Sequence[Adapter]) -> list[Tensor]:
    return [factor for adapter in adapters for factor in (adapter.a.weight, adapter.b.weight)]


def _product_dtype(factor: Tensor) -> torch.dtype:
    """What a linear map computes in whose weight is ``factor``: its dtype, or that of autocast, which leaves fp64 alone."""
    device = factor.device.type
    if torch.is_autocast_enabled(device) and factor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return factor.dtype
