"""Kinds of layers whose parameters' signals can be captured: the registry, and the plain kinds of torch and transformers.

To add a kind, write a function that looks at a module and says how it runs captured, or None, and register it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from entropy_fast.capture.functions import captured_layer_norm, captured_linear, captured_rows
from entropy_fast.capture.recorder import Recorder
from entropy_fast.libraries import is_exactly

__all__ = ["CapturedLayer", "Forward", "LayerKind", "Maker", "layer_kinds", "own_parameters", "register_layer_kind"]

Forward = Callable[..., Any]
Maker = Callable[[Forward, Recorder], Forward]  # from a module's forward and a recorder to the capturing forward


@dataclasses.dataclass(frozen=True)
class CapturedLayer:
    """How one module runs captured.

    Attributes:
        maker: makes its capturing forward, which computes what the module computes and hands the signals of its parameters to
            the recorder in place of their gradients.
        parameters: names of those parameters.
        stands_for: ids of modules inside it whose own forwards do not run then.
    """

    maker: Maker
    parameters: frozenset[str]
    stands_for: frozenset[int] = frozenset()


# From any module, and the names of trainable parameters by id; None where the module is of another kind.
LayerKind = Callable[[nn.Module, Mapping[int, str]], CapturedLayer | None]

_KINDS: list[LayerKind] = []


def register_layer_kind(kind: LayerKind) -> LayerKind:
    """Make a kind known, before those that are: the last that was registered is asked first. Returns it."""
    _KINDS.insert(0, kind)
    return kind


def layer_kinds() -> Iterator[LayerKind]:
    """All kinds, in the order in which they are asked."""
    return iter(tuple(_KINDS))


def own_parameters(module: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """The trainable parameters that a module itself holds: slot to name."""
    return {slot: names[id(p)] for slot, p in module._parameters.items() if p is not None and id(p) in names}


def plain_parameters(module: nn.Module, names: Mapping[int, str]) -> tuple[str | None, str | None]:
    """Names of a module's trainable weight and bias; twice None where it trains anything else, or runs a forward of its own.

    A forward of the instance's own (some libraries place one) may do anything with its parameters.
    """
    own = own_parameters(module, names)
    if set(own) - {"weight", "bias"} or "forward" in module.__dict__:
        return None, None
    return own.get("weight"), own.get("bias")


def _layer(maker: Maker, *parameters: str | None) -> CapturedLayer | None:
    named = frozenset(name for name in parameters if name is not None)
    return CapturedLayer(maker, named) if named else None


@register_layer_kind
def linear(module: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """``torch.nn.Linear``, and transformers' ``Conv1D``, which is one with a transposed weight."""
    transposed = is_exactly(module, "transformers.pytorch_utils.Conv1D")
    if type(module) is not nn.Linear and not transposed:
        return None
    both, layer = plain_parameters(module, names), cast_any(module)
    return _layer(
        lambda _, recorder: (
            lambda input: captured_linear(input, layer.weight, layer.bias, both, recorder, transposed=transposed)
        ),
        *both,
    )


@register_layer_kind
def layer_norm(module: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """``torch.nn.LayerNorm`` over the last dimension."""
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1 or module.weight is None:
        return None
    both = plain_parameters(module, names)
    return _layer(
        lambda _, recorder: lambda x: captured_layer_norm(x, module.weight, module.bias, module.eps, both, recorder),
        *both,
    )


@register_layer_kind
def rms_norm(module: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    """RMS norms of transformers, whose one vector is only ever broadcast against their input."""
    if not (type(module).__name__.endswith("RMSNorm") and type(module).__module__.startswith("transformers.")):
        return None
    weight, _ = plain_parameters(module, names)
    if weight is None or [p.dim() for p in module.parameters()] != [1]:
        return None
    return _layer(lambda forward, recorder: _with_weight_per_row(module, forward, weight, recorder), weight)


def cast_any(module: nn.Module) -> Any:
    """The module, of whose attributes nothing is known to a type checker."""
    return module


def _with_weight_per_row(module: nn.Module, forward: Forward, name: str, recorder: Recorder) -> Forward:
    """The module's own forward, its weight exchanged for one that has a row for every sequence."""

    def run(*arguments: Tensor, **options: Tensor) -> Any:
        x = next(iter((*arguments, *options.values())))
        parameter = module._parameters["weight"]
        assert parameter is not None
        try:
            module._parameters["weight"] = captured_rows(parameter, x, name, recorder)  # type: ignore[assignment]
            return forward(*arguments, **options)
        finally:
            module._parameters["weight"] = parameter

    return run
