"""A linear map and its LoRA adapters as one autograd function: fewer passes over activations, and fewer nodes, than apart.

Legend: W and b the base weight and bias, A_k and B_k the factors of adapter k, s_k its scaling.

    y = x W^T + b + Σ_k s_k (x A_k^T) B_k^T
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from entropy_fast.engines.capture.functions import Recorder

__all__ = ["lora_parts", "with_lora"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Adapter(NamedTuple):
    """Factors of one adapter, their names (None: frozen) and its scaling."""

    a: nn.Linear
    b: nn.Linear
    names: tuple[str | None, str | None]
    scaling: float


def lora_parts(
    module: Any, names: Mapping[int, str], captured: set[str]
) -> tuple[set[int], Callable[[Callable[..., Any], Recorder], Callable[..., Any]]] | None:
    """How to run a LoRA layer of plain linear maps as one function.

    Args:
        module: any module.
        names: trainable parameters by id.
        captured: those of them that may be captured.

    Returns:
        Ids of the modules that this stands for, and the forward's maker; None where the layer is of another kind or does
        something besides (other variants, merged or disabled adapters, biases, hooks, trained base weights).
    """
    layer = module if type(module) is LoraLinear else None
    if layer is None or "forward" in layer.__dict__ or bool(layer.disable_adapters) or bool(layer.merged):
        return None
    base: Any = module.base_layer
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active or any(name in module.lora_variant for name in active) or not _plain(base):
        return None
    if any(id(p) in names for p in base.parameters()):
        return None
    adapters = []
    for name in active:
        a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        # Dropout is off while a probe runs; anything else in its place is not known here.
        if not (_plain(a) and _plain(b)) or type(dropout) not in (nn.Identity, nn.Dropout) or _changed(dropout):
            return None
        if a.bias is not None or b.bias is not None or a.weight.dtype != base.weight.dtype:
            return None
        adapters.append(_Adapter(a, b, (names.get(id(a.weight)), names.get(id(b.weight))), float(module.scaling[name])))

    if not {name for adapter in adapters for name in adapter.names if name} <= captured:
        return None

    def maker(_: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def run(x: Tensor, *others: Any, **options: Any) -> Tensor:
            if others or options:
                raise TypeError(f"a LoRA layer was called with more than its input: {sorted(options)}")
            return with_lora(x.to(base.weight.dtype), base.weight, base.bias, adapters, recorder)

        return run

    return {id(module), *(id(m) for adapter in adapters for m in (adapter.a, adapter.b))}, maker


def with_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[_Adapter], recorder: Recorder
) -> Tensor:
    """Y of ``x`` [..., in]; what the adapters are trained by goes to ``recorder``."""
    factors = [factor for adapter in adapters for factor in (adapter.a.weight, adapter.b.weight)]
    result: Tensor = _WithLora.apply(x, weight, bias, adapters, recorder, *factors)  # type: ignore[no-untyped-call]
    return result


class _WithLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: Sequence[_Adapter],
        recorder: Recorder,
        *factors: Tensor,
    ) -> Tensor:
        output = F.linear(x, weight, bias)
        ctx.dtype = x.dtype
        # Under autocast the products are taken in its dtype.
        x = x.to(output.dtype)
        flat = output.view(-1, output.shape[-1])
        inner = []
        for adapter, a, b in zip(adapters, factors[::2], factors[1::2], strict=True):
            low = x.reshape(-1, x.shape[-1]) @ a.to(x.dtype).t()
            flat.addmm_(low, b.to(x.dtype).t(), alpha=adapter.scaling)
            inner.append(low)
        ctx.save_for_backward(x, weight, *inner, *factors)
        ctx.adapters, ctx.recorder = adapters, recorder
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        adapters, recorder = ctx.adapters, ctx.recorder
        x, weight, *rest = ctx.saved_tensors
        inner, factors = rest[: len(adapters)], rest[len(adapters) :]
        flat = dy.reshape(-1, dy.shape[-1])
        # Added up in the dtype of x, which is wider than that of the products under autocast.
        dx = (flat @ weight.to(dy.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        for adapter, low, a, b in zip(adapters, inner, factors[::2], factors[1::2], strict=True):
            a_name, b_name = adapter.names
            if b_name is not None:
                recorder.product(b_name, dy, (low * adapter.scaling).view(*dy.shape[:-1], -1))
            d_low = (flat @ b.to(dy.dtype)).mul_(adapter.scaling)
            if a_name is not None:
                recorder.product(a_name, d_low.view(*dy.shape[:-1], -1), x)
            if dx is not None and ctx.dtype == dy.dtype:
                dx.addmm_(d_low, a)
            elif dx is not None:
                dx += d_low @ a.to(dy.dtype)
        of_input = None if dx is None else dx.view(*dy.shape[:-1], -1)
        return of_input, None, None, None, None, *(None for _ in factors)


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not _changed(module)


def _changed(module: nn.Module) -> bool:
    """Whether this instance does more than its class."""
    return "forward" in module.__dict__ or any(getattr(module, h) for h in _HOOKS)
