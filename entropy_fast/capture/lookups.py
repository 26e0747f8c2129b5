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
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora.variants import DoraEmbeddingVariant
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entropy_fast.capture.functions import Recorder, captured_linear, captured_rows

__all__ = ["captured_embedding", "embedding_maker", "lora_embedding"]

Maker = Callable[[Callable[..., Any], Recorder], Callable[..., Any]]


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


def embedding_maker(module: nn.Module, own: Mapping[str, str]) -> Maker | None:
    """How to make the capturing forward of an embedding; None where the module is none, or its look-up does more.

    Of transformers' subclasses (scaled word embeddings, learned positions) the own forward runs, the look-up in it exchanged.

    Args:
        module: any module.
        own: its trainable parameters, slot to name.
    """
    if not isinstance(module, nn.Embedding) or set(own) != {"weight"}:
        return None
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return None
    table, name = module, own["weight"]
    if type(module) is nn.Embedding:
        return lambda _, recorder: (
            lambda index: captured_embedding(index, table.weight, table.padding_idx, name, recorder)
        )
    if not type(module).__module__.startswith("transformers."):
        return None

    def maker(forward: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with _ExchangedLookUp(table.weight, name, recorder):
                return forward(*arguments, **options)

        return run

    return maker


def lora_embedding(module: Any, names: Mapping[int, str]) -> tuple[set[int], Maker, set[str]] | None:
    """How to run a LoRA layer over an embedding, plain or DoRA, with its adapters captured.

    Args:
        module: any module.
        names: trainable parameters by id.

    Returns:
        Ids of the modules whose parameters it uses, the forward's maker, and the names of those parameters; None where the
        layer is of another kind or does something besides (other variants, merged or disabled adapters, tensor parallelism).
    """
    layer = module if type(module) is LoraEmbedding else None
    if layer is None or "forward" in layer.__dict__ or bool(layer.disable_adapters) or bool(layer.merged):
        return None
    if layer.input_fns or layer.output_fns or layer.tp_layer is not None:
        return None
    base: Any = layer.get_base_layer()
    if base.max_norm is not None or base.sparse or base.scale_grad_by_freq:
        return None
    active = [name for name in module.active_adapters if name in module.lora_embedding_A]
    if not active or any(type(v) is not DoraEmbeddingVariant for n, v in module.lora_variant.items() if n in active):
        return None
    magnitudes = [module.lora_magnitude_vector[name] for name in active if name in module.lora_variant]
    containers = [module.lora_embedding_A, module.lora_embedding_B, *magnitudes]
    used = {names[id(p)] for container in containers for p in container.parameters() if id(p) in names}
    if not used:
        return None

    def maker(_: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        norms: dict[str, Tensor] = {}

        def run(index: Tensor, *others: Any, **options: Any) -> Tensor:
            result: Tensor = module.base_layer(index, *others, **options)
            dtype = result.dtype
            scale = module._get_embed_scale()
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

    return {id(container) for container in containers}, maker, used


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
