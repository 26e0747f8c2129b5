"""Look-ups in a trained table: plain embeddings, those with a forward of their own, LoRA over an embedding.

Legend: E the base table, A [r, V] and B [out, r] the factors of an adapter, s its scaling, e the scale of the base's output (1
where it has none), m the magnitude of DoRA, ‖·‖ norms over the places of the table. For the place t:

    y_t = e E_t + Σ e s (B A)_t                                                LoRA
    y_t = g (e E_t + e s (B A)_t),  g = m / ‖E + s (B A)^T‖, without a gradient through the norm    DoRA
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entropy_fast.capture.functions import captured_linear, captured_rows
from entropy_fast.capture.layer_kinds import CapturedLayer, plain_parameters, register_layer_kind
from entropy_fast.capture.recorder import Recorder
from entropy_fast.libraries import embedding_scale, is_exactly

__all__ = ["captured_embedding"]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        weight: Tensor,
        padding_index: int | None,
        name: str,
        transposed: bool,
        recorder: Recorder,
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.padding_index, ctx.name, ctx.transposed, ctx.recorder = padding_index, name, transposed, recorder
        return F.embedding(index, weight.t() if transposed else weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (index,) = ctx.saved_tensors
        if ctx.padding_index is not None:
            # That row gets no gradient, as torch has it.
            dy = dy.masked_fill((index == ctx.padding_index).unsqueeze(-1), 0.0)
        ctx.recorder.scatter(ctx.name, index, dy, transposed=ctx.transposed)
        return None, None, None, None, None, None


def captured_embedding(
    index: Tensor,
    weight: Tensor,
    padding_index: int | None,
    name: str,
    recorder: Recorder,
    *,
    transposed: bool = False,
) -> Tensor:
    """A look-up in ``weight`` [places, b], or [b, places] if transposed, whose signal goes to ``recorder``."""
    result: Tensor = _Embedding.apply(  # type: ignore[no-untyped-call]
        index, weight, padding_index, name, transposed, recorder
    )
    return result


class _ExchangedLookUp(TorchFunctionMode):
    """While this is active, look-ups in one table are captured ones."""

    def __init__(self, weight: Tensor, name: str, recorder: Recorder) -> None:
        super().__init__()
        self._weight, self._name, self._recorder = weight, name, recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is F.embedding and len(args) == 2 and args[1] is self._weight:
            return captured_embedding(args[0], self._weight, options.get("padding_idx"), self._name, self._recorder)
        return func(*args, **options)


@register_layer_kind
def embedding(module: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """An embedding whose look-up does no more than look up.

    Of transformers' subclasses (scaled word embeddings, learned positions) the own forward runs, the look-up in it exchanged.
    """
    if not isinstance(module, nn.Embedding):
        return None
    table, (name, _) = module, plain_parameters(module, names)
    if name is None or table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
        return None
    if type(table) is nn.Embedding:
        return CapturedLayer(
            lambda _, recorder: (
                lambda index: captured_embedding(index, table.weight, table.padding_idx, name, recorder)
            ),
            frozenset({name}),
        )
    if not type(table).__module__.startswith("transformers."):
        return None

    def maker(forward: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with _ExchangedLookUp(table.weight, name, recorder):
                return forward(*arguments, **options)

        return run

    return CapturedLayer(maker, frozenset({name}))


@register_layer_kind
def lora_embedding(layer: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """A LoRA layer over an embedding, plain or DoRA, that does nothing besides.

    Not with other variants, merged or disabled adapters, or tensor parallelism.
    """
    module: Any = layer
    if not is_exactly(layer, "peft.tuners.lora.layer.Embedding") or "forward" in layer.__dict__:
        return None
    if module.disable_adapters or module.merged:
        return None
    if module.input_fns or module.output_fns or module.tp_layer is not None:
        return None
    base: Any = module.get_base_layer()
    if base.max_norm is not None or base.sparse or base.scale_grad_by_freq:
        return None
    active = [name for name in module.active_adapters if name in module.lora_embedding_A]
    variants = [variant for name, variant in module.lora_variant.items() if name in active]
    if not active or not all(is_exactly(v, "peft.tuners.lora.variants.DoraEmbeddingVariant") for v in variants):
        return None
    magnitudes = [module.lora_magnitude_vector[name] for name in active if name in module.lora_variant]
    containers = [module.lora_embedding_A, module.lora_embedding_B, *magnitudes]
    used = frozenset(names[id(p)] for container in containers for p in container.parameters() if id(p) in names)
    if not used:
        return None

    def maker(_: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        norms: dict[str, Tensor] = {}

        def run(index: Tensor, *others: Any, **options: Any) -> Tensor:
            result: Tensor = module.base_layer(index, *others, **options)
            dtype = result.dtype
            scale = embedding_scale(module)
            for adapter in active:
                added = _added(module, adapter, index, names, recorder)
                if scale is not None:
                    added = added * scale.to(added.dtype)
                if adapter not in module.lora_variant:
                    result = result + added
                    continue
                if adapter not in norms:
                    norms[adapter] = _norm(module, adapter)
                magnitude = module.lora_magnitude_vector[adapter].weight
                if id(magnitude) in names:
                    magnitude = captured_rows(magnitude, result, names[id(magnitude)], recorder)
                result = magnitude / norms[adapter] * (result + added)
            return result.to(dtype)

        return run

    return CapturedLayer(maker, used, frozenset(id(container) for container in containers))


def _added(module: Any, adapter: str, index: Tensor, names: Mapping[int, str], recorder: Recorder) -> Tensor:
    """What the adapter adds to every place in ``index``: s (B A)_t."""
    a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    padding = module.get_base_layer().padding_idx
    if id(a) in names:
        low = captured_embedding(index, a, padding, names[id(a)], recorder, transposed=True)
    else:
        low = F.embedding(index, a.t())
    return captured_linear(low, b, None, (names.get(id(b)), None), recorder) * float(module.scaling[adapter])


def _norm(module: Any, adapter: str) -> Tensor:
    """[out] norms over the places of the adapted table, as the layer itself computes them."""
    layer = module.lora_magnitude_vector[adapter]
    with torch.no_grad():
        a, b = module.lora_embedding_A[adapter].t(), module.lora_embedding_B[adapter].t()
        product = layer.get_lora_weight(lora_A=a, lora_B=b, adapter_name=adapter)
        norm: Tensor = layer.get_weight_norm(
            weight=module.get_base_layer().weight,
            lora_weight=product,
            scaling=module.scaling[adapter],
            adapter_name=adapter,
        )
    return norm
