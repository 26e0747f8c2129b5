"""Which LoRA layers run their low-rank part as one function: fewer passes over activations, and fewer nodes, than apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from entropy_fast.capture.functions import Recorder
from entropy_fast.capture.lora_functions import Adapter, added_lora, with_lora

__all__ = ["lora_parts"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Peft defines these only where bitsandbytes is installed.
_QUANTIZED = ("Linear4bit", "Linear8bitLt")


def lora_parts(
    module: Any, names: Mapping[int, str], captured: set[str]
) -> tuple[set[int], Callable[[Callable[..., Any], Recorder], Callable[..., Any]]] | None:
    """How to run a LoRA layer over a linear map with its low-rank part as one function.

    A frozen plain base is taken into it; another base (quantised, transposed, trained) runs by itself.

    Args:
        module: any module.
        names: trainable parameters by id.
        captured: those of them that may be captured.

    Returns:
        Ids of the modules that this stands for, and the forward's maker; None where the layer is of another kind or does
        something besides (other variants, merged or disabled adapters, biases or hooks of the factors).
    """
    layer = module if _is_lora(module) else None
    if layer is None or "forward" in layer.__dict__ or bool(layer.disable_adapters) or bool(layer.merged):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active or any(name in module.lora_variant for name in active):
        return None
    if not getattr(module, "cast_input_dtype_enabled", True):
        return None
    adapters = []
    for name in active:
        a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        # Dropout is off while a probe runs; anything else in its place is not known here.
        if not (_plain(a) and _plain(b)) or type(dropout) not in (nn.Identity, nn.Dropout) or _changed(dropout):
            return None
        if a.bias is not None or b.bias is not None or a.weight.dtype != b.weight.dtype:
            return None
        adapters.append(Adapter(a, b, (names.get(id(a.weight)), names.get(id(b.weight))), float(module.scaling[name])))
    if len({adapter.a.weight.dtype for adapter in adapters}) > 1:
        return None
    if not {name for adapter in adapters for name in adapter.names if name} <= captured:
        return None
    base: Any = module.base_layer
    whole = _plain(base) and not any(id(p) in names for p in base.parameters())

    def maker(_: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def run(x: Tensor, *others: Any, **options: Any) -> Any:
            if others or options:
                raise TypeError(f"a LoRA layer was called with more than its input: {sorted(options)}")
            if whole:
                return with_lora(x, base.weight, base.bias, adapters, recorder)
            return added_lora(x, base(x), adapters, recorder)

        return run

    return {id(module), *(id(m) for adapter in adapters for m in (adapter.a, adapter.b))}, maker


def _is_lora(module: Any) -> bool:
    quantized = type(module).__module__ == "peft.tuners.lora.bnb" and type(module).__name__ in _QUANTIZED
    return type(module) is LoraLinear or quantized


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not _changed(module)


def _changed(module: nn.Module) -> bool:
    """Whether this instance does more than its class."""
    return "forward" in module.__dict__ or any(getattr(module, h) for h in _HOOKS)
