"""Which modules' parameters are captured, and the exchange of their forwards while a capture runs.

A parameter is captured where it is used as a module of a known kind uses it. Whatever else a model does with it shows as an
ordinary gradient after the backward (`uncaptured_uses`), and such a parameter is left to the slower path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from entropy_fast.capture.dora import dora_maker
from entropy_fast.capture.functions import Recorder, captured_layer_norm, captured_linear, captured_rows
from entropy_fast.capture.lookups import embedding_maker, lora_embedding
from entropy_fast.capture.lora import lora_parts
from entropy_fast.capture.scaled import ia3_linear

__all__ = ["CapturedModules"]

Forward = Callable[..., Any]


class CapturedModules:
    """The modules of a model that hold captured parameters.

    Args:
        module: the model.
        names: trainable parameters by id: their names in the registry.
        left_out: names that must not be captured.
    """

    def __init__(self, module: nn.Module, names: Mapping[int, str], left_out: frozenset[str] = frozenset()) -> None:
        holders: list[tuple[nn.Module, Callable[[Forward, Recorder], Forward] | None, set[str]]] = []
        contained: set[int] = set()
        for path, submodule in module.named_modules():
            layer = lora_embedding(submodule, names) or ia3_linear(submodule, names)
            if layer is not None:
                # Its parameters lie in modules whose own forwards do not run then.
                containers, layer_maker, used = layer
                contained |= containers
                holders.append((submodule, layer_maker, used))
            if id(submodule) in contained:
                continue
            own = {slot: names[id(p)] for slot, p in submodule._parameters.items() if p is not None and id(p) in names}
            if own:
                # Experts get tokens in an order of their own, which nothing in their shape tells.
                routed = "experts" in path.split(".")
                holders.append((submodule, None if routed else _maker(submodule, own), set(own.values())))
        # A captured module hands nothing to ordinary autograd, so it is captured whole or not at all; and a parameter is
        # captured in all its modules or in none.
        refused = set(left_out)
        refused.update(*(own for _, maker, own in holders if maker is None))
        while any(own & refused and own - refused for _, _, own in holders):
            refused.update(*(own for _, _, own in holders if own & refused))
        self.captured: set[str] = set().union(*(own for _, _, own in holders)) - refused
        fused: set[int] = set()
        self._makers: list[tuple[nn.Module, Callable[[Forward, Recorder], Forward]]] = []
        for submodule in module.modules():
            found = lora_parts(submodule, names, self.captured)
            if found is not None:
                fused |= found[0]
                self._makers.append((submodule, found[1]))
        self._makers.extend(
            (submodule, maker)
            for submodule, maker, own in holders
            if maker and not own & refused and id(submodule) not in fused
        )

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Forwards and backwards in this context hand their signals to ``recorder``."""
        changed = []
        try:
            for submodule, maker in self._makers:
                submodule.forward = maker(submodule.forward, recorder)
                changed.append(submodule)
            yield
        finally:
            for submodule in changed:
                del submodule.forward


def uncaptured_uses(tensors: Sequence[Tensor], names: Sequence[str], captured: set[str]) -> set[str]:
    """Captured parameters that have an ordinary gradient all the same: something else in the model uses them too."""
    return {name for tensor, name in zip(tensors, names, strict=True) if tensor.grad is not None and name in captured}


def _maker(module: nn.Module, own: Mapping[str, str]) -> Callable[[Forward, Recorder], Forward] | None:
    """How to make the capturing forward of a module whose trainable parameters are ``own`` (slot to name)."""
    weight, bias = own.get("weight"), own.get("bias")
    # A forward of the instance's own (some libraries place one) may do anything with its parameters.
    if set(own) - {"weight", "bias"} or "forward" in module.__dict__:
        return None
    if type(module) is nn.Linear:
        return lambda _, recorder: (
            lambda input: captured_linear(input, module.weight, module.bias, (weight, bias), recorder)
        )
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return _transposed_linear(module, weight, bias)
    if isinstance(module, nn.Embedding):
        return embedding_maker(module, own)
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.weight is not None:
        return lambda _, recorder: (
            lambda x: captured_layer_norm(x, module.weight, module.bias, module.eps, (weight, bias), recorder)
        )
    if weight and (found := dora_maker(module, weight)) is not None:
        return found
    is_rms_norm = type(module).__name__.endswith("RMSNorm") and type(module).__module__.startswith("transformers.")
    if is_rms_norm and weight and [p.dim() for p in module.parameters()] == [1]:
        return lambda forward, recorder: _with_weight_per_row(module, forward, weight, recorder)
    return None


def _transposed_linear(module: Any, weight: str | None, bias: str | None) -> Callable[[Forward, Recorder], Forward]:
    return lambda _, recorder: (
        lambda input: captured_linear(input, module.weight, module.bias, (weight, bias), recorder, transposed=True)
    )


def _with_weight_per_row(module: nn.Module, forward: Forward, name: str, recorder: Recorder) -> Forward:
    """The module's own forward, its weight exchanged for one that has a row for every sequence."""

    def run(*arguments: Tensor, **options: Tensor) -> Any:
        x = next(iter((*arguments, *options.values())))
        parameter = module._parameters["weight"]
        assert parameter is not None
        module._parameters["weight"] = captured_rows(parameter, x, name, recorder)  # type: ignore[assignment]
        try:
            return forward(*arguments, **options)
        finally:
            module._parameters["weight"] = parameter

    return run
