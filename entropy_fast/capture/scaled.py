"""IA3: a trained vector times the input or the output of a linear map.

Legend: W and b weight and bias, l the product of the active adapters' vectors.

    y = W (l x) + b  where the layer is marked as feed-forward,  y = l (W x + b)  elsewhere
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.capture.layer_kinds import CapturedLayer, register_layer_kind
from entropy_fast.capture.recorder import Recorder
from entropy_fast.libraries import is_exactly


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, name: str | None, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(x, vector)
        ctx.name, ctx.recorder = name, recorder
        return x * vector.flatten()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, vector = ctx.saved_tensors
        if ctx.name is not None:
            ctx.recorder.per_position(ctx.name, dy * x)
        dx = (dy * vector.flatten()).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None


@register_layer_kind
def ia3_linear(layer: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """An IA3 layer over a linear map that trains its vectors, neither merged nor disabled."""
    module: Any = layer
    if not is_exactly(layer, "peft.tuners.ia3.layer.Linear") or "forward" in layer.__dict__:
        return None
    if module.disable_adapters or module.merged:
        return None
    vectors = [module.ia3_l[name] for name in module.active_adapters if name in module.ia3_l]
    used = frozenset(names[id(p)] for p in module.ia3_l.parameters() if id(p) in names)
    if not vectors or not used:
        return None

    def maker(_: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def scaled(x: Tensor) -> Tensor:
            dtype = x.dtype
            if module.is_feedforward:
                x = x.to(vectors[-1].dtype)
            for vector in vectors:
                x = _Scaled.apply(x, vector, names.get(id(vector)), recorder)  # type: ignore[no-untyped-call]
            return x.to(dtype)

        def run(x: Tensor, *others: Any, **options: Any) -> Any:
            if module.is_feedforward:
                return module.base_layer(scaled(x), *others, **options)
            return scaled(module.base_layer(x, *others, **options))

        return run

    return CapturedLayer(maker, used, frozenset({id(module.ia3_l)}))
