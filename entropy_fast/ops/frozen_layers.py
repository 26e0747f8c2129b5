"""Layers without a trained parameter whose forward and backward are one compiled pass each: RMS norm, and the gate of an MLP.

Twins of what a model computes with a dozen tensor operations, for CPUs; the formulas are in csrc/frozen_layers.h.
``entropy_fast.reference.frozen_layers`` says them in plain torch. In 16 bits the forward rounds where that does, and the
backward only its results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entropy_fast.errors import ConfigError
from entropy_fast.ops import native_backend
from entropy_fast.ops.backends import count_call, runs_natively
from entropy_fast.ops.registration import accumulator, described

__all__ = ["compiled_layers_take", "gated_silu", "rms_norm"]


def compiled_layers_take(*tensors: Tensor) -> bool:
    """Whether `rms_norm` and `gated_silu` can be called with these: on the CPU, of one floating-point dtype."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and all(t.dtype == dtype and t.device.type == "cpu" and t.layout == torch.strided for t in tensors)
        and runs_natively(tensors[0].device)
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Weight · x / sqrt(mean(x²) + ε) along the last dimension, differentiable in ``x`` once.

    Args:
        x: [..., H].
        weight: [H], in the same dtype; not differentiated.
        epsilon: ε, not negative.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the compiled kernels do not take them (`compiled_layers_take`).
    """
    if not (x.dim() and x.shape[-1:] == weight.shape and compiled_layers_take(x, weight)):
        raise _do_not_fit("rms_norm", "[..., H] and [H]", x, weight)
    if not epsilon >= 0:
        raise ConfigError(f"rms_norm got epsilon = {epsilon!r}.", fix="pass a number that is not negative.")
    result: Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of two tensors [..., H] of one dtype, differentiable in both once.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the compiled kernels do not take them (`compiled_layers_take`).
    """
    if not (gate.dim() and gate.shape == up.shape and compiled_layers_take(gate, up)):
        raise _do_not_fit("gated_silu", "[..., H] twice", gate, up)
    result: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def _do_not_fit(op: str, expected: str, *tensors: Tensor) -> ConfigError:
    return ConfigError(
        f"{op} got {', '.join(map(described, tensors))}; expected {expected}, of one floating-point dtype, on a CPU whose "
        "compiled kernels may run.",
        fix="ask compiled_layers_take first; entropy_fast.reference has the same for every device.",
    )


def _run(function: str, *tensors: Tensor, parameters: tuple[float, ...] = ()) -> None:
    count_call("native", function.rsplit("_", 1)[0])
    native_backend.on_rows(function, *tensors, parameters=parameters)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows, weight = _rows(x), weight.contiguous()
        y, scales = torch.empty_like(rows), rows.new_empty(len(rows), dtype=accumulator(rows))
        _run("rms_norm_forward", rows, weight, y, scales, parameters=(epsilon,))
        ctx.save_for_backward(x, weight, scales)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        rows = _rows(x)
        dx = torch.empty_like(rows)
        _run("rms_norm_backward", _rows(dy), rows, weight, scales, dx)
        return dx.view(x.shape), None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        rows = _rows(gate)
        y = torch.empty_like(rows)
        _run("gated_silu_forward", rows, _rows(up), y)
        return y.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        rows = _rows(gate)
        dgate, dup = torch.empty_like(rows), torch.empty_like(rows)
        _run("gated_silu_backward", _rows(dy), rows, _rows(up), dgate, dup)
        return dgate.view(gate.shape), dup.view(up.shape)
