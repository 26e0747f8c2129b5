"""DoRA over a linear map: its magnitude's signal, beside those of its factors.

Legend: W and b base weight and bias, A and B the factors, s their scaling, m the magnitude [out], n the norms of the rows of
W + s B A.

    y = W x + b + (g - 1) W x + g s B A x,  g = m / n, without a gradient through n
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entropy_fast.capture.layer_kinds import CapturedLayer, plain_parameters, register_layer_kind
from entropy_fast.capture.recorder import Recorder
from entropy_fast.libraries import dequantized_weight, is_exactly


class _Magnitude(torch.autograd.Function):
    """(g - 1) u + g s v for the base's part u and the adapter's part v, both [..., out]."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        low_rank: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scaling: float,
        name: str,
        recorder: Recorder,
    ) -> Tensor:
        ctx.save_for_backward(base, low_rank, magnitude, norm)
        ctx.scaling, ctx.name, ctx.recorder = scaling, name, recorder
        factor = magnitude / norm
        return (factor - 1) * base + factor * low_rank * scaling

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        base, low_rank, magnitude, norm = ctx.saved_tensors
        factor = magnitude / norm
        ctx.recorder.per_position(ctx.name, dy * (base + low_rank * ctx.scaling) / norm)
        of_base = ((factor - 1) * dy).to(base.dtype) if ctx.needs_input_grad[0] else None
        of_low_rank = (factor * dy * ctx.scaling).to(low_rank.dtype) if ctx.needs_input_grad[1] else None
        return of_base, of_low_rank, None, None, None, None, None


@register_layer_kind
def dora_magnitude(module: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """A module that holds DoRA's magnitude for a linear map.

    The norms are those that the module itself computes, once for as long as a recording lasts.
    """
    if not is_exactly(module, "peft.tuners.lora.dora.DoraLinearLayer"):
        return None
    name, _ = plain_parameters(module, names)
    if name is None:
        return None
    layer: Any = module

    def maker(_: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        norms: dict[torch.dtype, Tensor] = {}

        def run(
            x: Tensor,
            *,
            lora_A: nn.Module,
            lora_B: nn.Module,
            scaling: float,
            base_layer: Any,
            base_result: Tensor | None = None,
            adapter_name: str = "default",
        ) -> Tensor:
            if x.dtype not in norms:
                norms[x.dtype] = _norm(layer, x.dtype, lora_A, lora_B, scaling, base_layer, adapter_name)
            low_rank = lora_B(lora_A(x))
            if base_result is None:
                weight = dequantized_weight(base_layer).to(x.dtype)
                base_result = F.linear(x, weight.t() if layer.fan_in_fan_out else weight)
            elif base_layer.bias is not None:
                base_result = base_result - base_layer.bias
            result: Tensor = _Magnitude.apply(  # type: ignore[no-untyped-call]
                base_result, low_rank, layer.weight, norms[x.dtype], scaling, name, recorder
            )
            return result

        return run

    return CapturedLayer(maker, frozenset({name}))


def _norm(
    layer: Any,
    dtype: torch.dtype,
    lora_a: nn.Module,
    lora_b: nn.Module,
    scaling: float,
    base_layer: nn.Module,
    adapter: str,
) -> Tensor:
    """[out] n."""
    with torch.no_grad():
        product = layer.get_lora_weight(lora_A=lora_a, lora_B=lora_b, adapter_name=adapter).to(dtype)
        weight = dequantized_weight(base_layer).to(dtype)
        norm: Tensor = layer.get_weight_norm(weight=weight, lora_weight=product, scaling=scaling, adapter_name=adapter)
    return norm
