"""Which LoRA layers run their low-rank part as one function: fewer passes over activations, and fewer nodes, than apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from entropy_fast.capture.layer_kinds import CapturedLayer, register_layer_kind
from entropy_fast.capture.lora_functions import Adapter, added_lora, with_lora
from entropy_fast.capture.recorder import Recorder
from entropy_fast.libraries import is_exactly

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LORA = tuple(f"peft.tuners.lora.{name}" for name in ("layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt"))


@register_layer_kind
def lora_linear(layer: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """A LoRA layer over a linear map, its low-rank part run as one function, that does nothing besides.

    A frozen plain base is taken into it; another base (quantised, transposed, trained) runs by itself. Not with variants,
    merged or disabled adapters, biases or hooks of the factors: their parts are then captured one by one where they can be.
    """
    module: Any = layer
    if not is_exactly(layer, *_LORA) or "forward" in layer.__dict__ or module.disable_adapters or module.merged:
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

    used = frozenset(name for adapter in adapters for name in adapter.names if name)
    return CapturedLayer(maker, used, frozenset(id(m) for adapter in adapters for m in (adapter.a, adapter.b)))


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not _changed(module)


def _changed(module: nn.Module) -> bool:
    """Whether this instance does more than its class."""
    return "forward" in module.__dict__ or any(getattr(module, h) for h in _HOOKS)
