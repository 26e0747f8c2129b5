"""Autograd functions that hand a parameter's gradient signal to a recorder in place of computing its gradient.

Each computes what the module it stands for computes. Nothing is copied: a function saves what the module's own backward would
have saved. The parameter stays an input, so that the output requires a gradient when nothing else does, but its own gradient
is None.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from entropy_fast.capture.recorder import Recorder

__all__ = ["captured_layer_norm", "captured_linear", "captured_rows"]


class _Linear(torch.autograd.Function):
    """x W^T + b for ``weight`` [out, in], or x W + b for a transposed one [in, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        names: tuple[str | None, str | None],
        transposed: bool,
        recorder: Recorder,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.names, ctx.transposed, ctx.recorder = names, transposed, recorder
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_name, bias_name = ctx.names
        if weight_name is not None:
            ctx.recorder.product(weight_name, *((x, dy) if ctx.transposed else (dy, x)))
        if bias_name is not None:
            ctx.recorder.per_position(bias_name, dy)
        dx = None
        if ctx.needs_input_grad[0]:
            # Under autocast the product was taken in the output's dtype.
            matrix = weight.to(dy.dtype)
            dx = (dy @ (matrix.t() if ctx.transposed else matrix)).to(x.dtype)
        return dx, None, None, None, None, None


def captured_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str | None, str | None],
    recorder: Recorder,
    *,
    transposed: bool = False,
) -> Tensor:
    """A linear map whose weight's and bias's signals go to ``recorder`` under ``names`` (None: it is frozen)."""
    result: Tensor = _Linear.apply(x, weight, bias, names, transposed, recorder)  # type: ignore[no-untyped-call]
    return result


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        names: tuple[str | None, str | None],
        recorder: Recorder,
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(x, list(weight.shape), weight, bias, eps)
        # Autocast may have computed in a wider dtype than that of x.
        ctx.save_for_backward(x.to(output.dtype), weight, mean, rstd)
        ctx.names, ctx.recorder, ctx.dtype = names, recorder, x.dtype
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        weight_name, bias_name = ctx.names
        if weight_name is not None:
            ctx.recorder.per_position(weight_name, dy * ((x - mean) * rstd))
        if bias_name is not None:
            ctx.recorder.per_position(bias_name, dy)
        dx = None
        if ctx.needs_input_grad[0]:
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                dy, x, list(weight.shape), mean, rstd, weight, None, [True, False, False]
            )
            dx = dx.to(ctx.dtype)
        return dx, None, None, None, None, None


def captured_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    names: tuple[str | None, str | None],
    recorder: Recorder,
) -> Tensor:
    """Layer normalisation over the last dimension whose weight's and bias's signals go to ``recorder``."""
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps, names, recorder)  # type: ignore[no-untyped-call]
    return result


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: tuple[int, ...], name: str, recorder: Recorder) -> Tensor:
        ctx.name, ctx.recorder, ctx.shape = name, recorder, weight.shape
        return weight.expand(*rows, *weight.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        ctx.recorder.per_row(ctx.name, dy.reshape(-1, *ctx.shape))
        return None, None, None, None


def captured_rows(weight: Tensor, x: Tensor, name: str, recorder: Recorder) -> Tensor:
    """A vector that multiplies the last dimension of ``x`` [N, ..., H], seen once per row: [N, 1, ..., H].

    Where a backward's rows are the tokens of a packed batch, it is seen once per token. For modules that only ever
    broadcast it against their input.
    """
    result: Tensor = _Rows.apply(weight, recorder.rows_of(x), name, recorder)  # type: ignore[no-untyped-call]
    return result
