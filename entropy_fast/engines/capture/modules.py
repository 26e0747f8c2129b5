"""Which modules' parameters are captured, and the exchange of their forwards while a capture runs.

A parameter is captured where it is used as a module of a known kind uses it. Whatever else a model does with it shows as an
ordinary gradient after the backward (`uncaptured_uses`), and such a parameter is left to the slower path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from entropy_fast.engines.capture.functions import (
    Recorder,
    captured_embedding,
    captured_layer_norm,
    captured_linear,
    captured_rows,
)

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
        wanted = {key: name for key, name in names.items() if name not in left_out}
        makers = []
        self.captured: set[str] = set()
        unknown: set[str] = set()
        for submodule in module.modules():
            own = {
                slot: wanted[id(p)] for slot, p in submodule._parameters.items() if p is not None and id(p) in wanted
            }
            if not own:
                continue
            maker = _maker(submodule, own)
            if maker is None:
                unknown.update(own.values())
            else:
                makers.append((submodule, maker))
                self.captured.update(own.values())
        # A tied parameter that one of its modules uses in an unknown way is not captured anywhere.
        self.captured -= unknown
        self._makers = [
            (submodule, maker)
            for submodule, maker in makers
            if not unknown.intersection(wanted.get(id(p), "") for p in submodule._parameters.values() if p is not None)
        ]

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Forwards and backwards in this context hand their signals to ``recorder``."""
        changed = []
        try:
            for submodule, maker in self._makers:
                own = submodule.__dict__.get("forward")
                submodule.forward = maker(submodule.forward, recorder)
                changed.append((submodule, own))
            yield
        finally:
            for submodule, own in reversed(changed):
                if own is None:
                    del submodule.forward
                else:
                    submodule.forward = own


def uncaptured_uses(tensors: Sequence[Tensor], names: Sequence[str], captured: set[str]) -> set[str]:
    """Captured parameters that have an ordinary gradient all the same: something else in the model uses them too."""
    return {name for tensor, name in zip(tensors, names, strict=True) if tensor.grad is not None and name in captured}


def _maker(module: nn.Module, own: Mapping[str, str]) -> Callable[[Forward, Recorder], Forward] | None:
    """How to make the capturing forward of a module whose trainable parameters are ``own`` (slot to name)."""
    weight, bias = own.get("weight"), own.get("bias")
    if set(own) - {"weight", "bias"} or module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Linear:
        return lambda _, recorder: lambda x: captured_linear(x, module.weight, module.bias, (weight, bias), recorder)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return lambda _, recorder: (
            lambda x: captured_linear(x, module.weight, module.bias, (weight, bias), recorder, transposed=True)
        )
    if type(module) is nn.Embedding and weight and module.max_norm is None and not module.sparse:
        if module.padding_idx is None and not module.scale_grad_by_freq:
            return lambda _, recorder: lambda index: captured_embedding(index, module.weight, weight, recorder)
        return None
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.weight is not None:
        return lambda _, recorder: (
            lambda x: captured_layer_norm(x, module.weight, module.bias, module.eps, (weight, bias), recorder)
        )
    is_rms_norm = type(module).__name__.endswith("RMSNorm") and type(module).__module__.startswith("transformers.")
    if is_rms_norm and weight and [p.dim() for p in module.parameters()] == [1]:
        return lambda forward, recorder: _with_weight_per_row(module, forward, weight, recorder)
    return None


def _with_weight_per_row(module: nn.Module, forward: Forward, name: str, recorder: Recorder) -> Forward:
    """The module's own forward, its weight exchanged for one that has a row for every sequence."""

    def run(x: Tensor) -> Any:
        parameter = module._parameters["weight"]
        assert parameter is not None
        module._parameters["weight"] = captured_rows(parameter, x, name, recorder)  # type: ignore[assignment]
        try:
            return forward(x)
        finally:
            module._parameters["weight"] = parameter

    return run
